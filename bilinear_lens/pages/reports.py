"""Pages: of a token (table, spectrum, text, ablation), a circuit, and an image that was seen."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from bilinear_lens.analysis.circuits import Circuit
from bilinear_lens.analysis.explanation import Explanation
from bilinear_lens.analysis.interactions import InteractionTable, random_spectrum
from bilinear_lens.models.classifier import HookedBilinearClassifier
from bilinear_lens.models.transformer import HookedBilinearTransformer
from bilinear_lens.spectrum import Spectrum
from bilinear_lens.views import graphs, images, measures, plots, tables, tokens
from bilinear_lens.views.report import Section, page

N_PAIRED = 1
"""How many tokens at each end of each eigenvector the matrix of interactions shows."""


def passage(
    model: HookedBilinearTransformer, text: Sequence[str], answer: int, *, n_tokens: int = 40
) -> Int[Tensor, " n_tokens"]:
    """The beginning of the document in which `answer` comes most often by then."""
    if model.tokenizer is None:
        raise ValueError("This model has no tokenizer: load it with tokenizer=...")
    encoded = model.tokenizer(list(text), add_special_tokens=False, verbose=False)["input_ids"]
    beginnings = [ids[: min(n_tokens, model.cfg.n_ctx) - 1] for ids in encoded]
    chosen = max(beginnings, key=lambda ids: ids.count(answer))
    return torch.tensor([model.tokenizer.bos_token_id, *chosen])


def token_page(
    model: HookedBilinearTransformer,
    table: InteractionTable,
    *,
    curve: pd.DataFrame,
    read: Int[Tensor, " n_tokens"],
    source: str,
    generated: str,
) -> str:
    """A self-contained HTML page about one output of one layer.

    Args:
        curve: of the same output, from `ablation_curve`.
        read: tokens of a text, to be coloured by the eigenvectors' activations.
        source: where the text and that of the curve come from.
        generated: text that the model wrote.
    """
    frame = table.to_pandas()
    mlp_in = f"blocks.{table.layer}.mlp.hook_in"
    pattern = f"blocks.{table.layer}.attn.hook_pattern"
    with torch.no_grad():
        _, cache = model.run_with_cache(read[None], names_filter=[mlp_in, pattern])
    words = [model.token_labels[token] for token in read.tolist()]
    names = [f"{i} ({value:+.2g})" for i, value in enumerate(table.spectrum.values.tolist())]
    whole = Spectrum.of(table.interaction)
    random = random_spectrum(
        model.bilinear_tensor(table.layer), seed=0, norm=whole.values.norm().item()
    )
    strongest = frame.groupby(["eigenvector", "end"]).head(N_PAIRED)["token_id"].unique().tolist()
    chosen = table.tokens[strongest]
    directions = chosen.directions
    d_model = directions.shape[1]
    matrix = directions @ table.interaction[:d_model, :d_model] @ directions.mT
    return page(
        f"What writes {table.output.removesuffix(' - mean')}",
        lead=f"{table.header}. A mean is that over the vocabulary. Everything here but the "
        "coloured text, the attention and the ablation is read from the weights.",
        sections=[
            Section(
                "Eigenvectors",
                "The input patterns that write this output, strongest first: a positive eigenvalue "
                "raises it, a negative one lowers it, whichever end the input lies at. Chips are "
                "the tokens whose embeddings lie furthest at each end: blue raises, red lowers.",
                tables.eigenvectors(frame),
            ),
            Section(
                "Spectrum",
                "Eigenvalues by magnitude, beside those of Gaussian weights of the same shape, "
                "scaled to the same total.",
                plots.spectrum(whole, control=random),
            ),
            Section(
                "Pairs of tokens",
                "The strongest interactions between two tokens of the whole vocabulary, and all "
                "interactions between the tokens at the eigenvectors' ends.",
                [
                    tables.pairs(table.pairs(12)),
                    plots.interaction_matrix(matrix, labels=chosen.labels),
                ],
            ),
            Section(
                "On text",
                f"From {source}. The further a token's colour is from the page's own, the more the "
                "chosen eigenvector adds there: bluish raises the output, reddish lowers it. Point "
                "at a token for the value.",
                tokens.text(words, table.spectrum.activations(cache[mlp_in][0]), labels=names),
            ),
            Section(
                "Attention",
                f"Where the heads of layer {table.layer} look in the same text: the MLP reads what "
                "they bring, besides the token itself.",
                tokens.attention(
                    words,
                    cache[pattern][0],
                    labels=[f"L{table.layer}H{head}" for head in range(model.cfg.n_heads)],
                ),
            ),
            Section(
                "Ablation",
                f"Is the table true? On {curve['n_positions'].iloc[0]} positions of {source} where "
                "the token is the right answer, k eigenvectors are taken out of the running model. "
                "Controls: those of smallest magnitude, and random orthonormal directions. Bands "
                "are 95 % bootstrap intervals.",
                [
                    plots.ablation_curve(
                        curve, measure="logit", title=f"Change of the logit, {table.output}"
                    ),
                    plots.ablation_curve(curve, measure="loss", title="Change of the loss (nats)"),
                ],
            ),
            Section("The model writes", "Sampled at temperature 0.7.", generated),
        ],
    )


def circuit_page(
    circuit: Circuit, *, random: Sequence[Circuit], curve: pd.DataFrame, source: str
) -> str:
    """A self-contained HTML page about a circuit.

    Args:
        circuit: with its effects measured.
        random: circuits of random nodes, measured too.
        curve: of all of them, from `faithfulness`.
        source: where the text is from that they were measured on.
    """
    nodes = [("traced", circuit), *(("random", each) for each in random)]
    points = pd.concat(
        each.nodes.iloc[1:]
        .assign(group=name)
        .rename(columns={"node": "label", "score": "predicted"})
        for name, each in nodes
    )
    ours, theirs = circuit.correlation, pd.DataFrame([each.correlation for each in random]).mean()
    share = "its value at the end of the prompt" if circuit.prompt else "its variance"
    return page(
        f"What {circuit.output.removesuffix(' - mean')} reads",
        lead=f"{circuit.title}. A node writes along what the nodes above it read; shares are of "
        f"{share}.",
        sections=[
            Section(
                "Circuit",
                "Point at a node for what it reads, click it for the paths through it; what "
                "carries more is drawn thicker. e0 is an MLP's first eigenvector, for the "
                "direction that is read above; L0H3 a head; #2 another direction at the place.",
                graphs.circuit(circuit.nodes, circuit.edges),
            ),
            Section(
                "Predicted and measured",
                "For each node the predicted share of the output, and what the running model loses "
                f"without it{'' if circuit.prompt else f', on {source}'}; beside it, random nodes. "
                f"They correlate {ours['nodes']:.2f} (random: {theirs['nodes']:.2f}), by rank "
                f"{ours['nodes, ranks']:.2f} ({theirs['nodes, ranks']:.2f}); edges "
                f"{ours['edges']:.2f} ({theirs['edges']:.2f}), by rank "
                f"{ours['edges, ranks']:.2f} ({theirs['edges, ranks']:.2f}).",
                measures.trade_off(points, x="predicted", y="measured"),
            ),
            Section(
                "Faithfulness",
                "How much of the output is left where nothing but the first nodes of the circuit "
                f"writes it, and the rest stands at its mean over {source}: beside it, circuits of "
                "random nodes, with their range.",
                measures.faithfulness(curve),
            ),
        ],
    )


def image_page(model: HookedBilinearClassifier, explanation: Explanation, *, name: str) -> str:
    """A self-contained HTML page about what a classifier of one layer saw in one image.

    Args:
        name: what the image is called.
    """
    shape = model.cfg.input_shape
    signs = "Around grey, a colour and its complement" if shape[0] == 3 else "Blue and vermilion"
    (tensor,) = model.tensors()
    whole = tensor.eigh(torch.eye(tensor.d_out).to(tensor.left))
    best = model.class_number(explanation.prediction)
    one = Spectrum(whole.values[best], whole.vectors[best], whole.affine)
    return page(
        f"Why {explanation.prediction}",
        lead=f"{name[:1].upper()}{name[1:]}. The logit of a class is exactly the sum of its "
        "eigenvectors' activations, value x (eigenvector . image)^2; the patterns are read from "
        "the weights alone.",
        sections=[
            Section(
                "What fired",
                "The eigenvectors with the largest activations, for the classes of the largest "
                f"logits. {signs} are the two signs of a pattern: an image that is bright on one "
                "of them makes it fire, on both at once it cancels. A positive activation raises "
                "the logit.",
                images.explanation(
                    explanation.image,
                    explanation.logits,
                    explanation.table,
                    explanation.spectrum,
                    shape=shape,
                ),
            ),
            Section(
                f"The class {explanation.prediction}",
                "Its eigenvalues, and the eigenvectors at both ends: above what speaks for the "
                "class, below what speaks against it.",
                images.class_spectrum(one, shape=shape),
            ),
            Section(
                "All classes",
                "The eigenvectors of largest magnitude of every class, with their eigenvalues.",
                images.eigenvectors(whole, shape=shape, labels=model.cfg.labels),
            ),
        ],
    )
