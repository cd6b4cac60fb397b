"""Saved models onto the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx, validate_repo_id

from bilinear_lens.models.checkpoints import check_weight_files, pickles, read_config

PUSHED = (
    "README.md",
    "LICENSE*",
    "*.json",
    "*.csv",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
)
"""What a saved model is made of; nothing else that lies in its folder is uploaded."""


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a saved model to the Hugging Face Hub: config, safetensors, tokenizer and card.

    Of the folder only those files are uploaded, and licences; nothing of its subfolders. All that
    can be checked here is checked before the network is asked.

    Args:
        folder: with a `README.md` that says how the model was made and what that cost.
        repo_id: `user/name`; the repository is made if there is none.
        private: refuse to upload to a repository that all can see, and make a private one.
        revision: a branch, made if there is none; the main one otherwise.
        token: what `hf auth login` saved, otherwise.

    Returns:
        The address of the repository.

    Raises:
        ValueError: if the folder is missing, has no config or card, or its weights are missing,
            cut short or pickles; if `repo_id` is none, or the Hub cannot be reached or refuses.
    """
    folder = Path(folder)
    _check_pushable(folder, repo_id)
    try:
        api = HfApi(token=token)
        url = str(api.create_repo(repo_id, private=private, exist_ok=True))
        if private and not api.repo_info(repo_id).private:
            raise ValueError(
                f"{repo_id} is there already, and public: make it private in its settings, or give "
                "another name."
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
            url = f"{url}/tree/{revision}"
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Upload model",
            allow_patterns=[*PUSHED],
            ignore_patterns=["*/*"],
        )
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"Cannot push to {repo_id!r} on the Hugging Face Hub: {said}. "
            "Check the network, and that `hf auth login` (or token=) gave a token that may write."
        ) from error
    return url


def _check_pushable(folder: Path, repo_id: str) -> None:
    """Refuse, before any network, what should not be on the Hub.

    Raises:
        ValueError: as `push_to_hub`.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}: give one that save_pretrained made.")
    read_config(folder)
    check_weight_files(folder)
    if names := pickles(folder):
        raise ValueError(
            f"{folder} holds pickles ({', '.join(names)}), which can run code: move them "
            "elsewhere, safetensors are enough."
        )
    card = folder / "README.md"
    if not card.is_file() or not card.read_text(encoding="utf-8").strip():
        raise ValueError(
            f"{folder} has no model card: write a README.md that says how the model was made, on "
            "what data, and what it cost. `bilinear-lens train` and `bilinearize` write one."
        )
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is no name on the Hub: give user/name.")
    validate_repo_id(repo_id)
