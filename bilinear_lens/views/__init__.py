"""Views: plain data in, a figure, a token view, a table or a page out. They know no model."""
