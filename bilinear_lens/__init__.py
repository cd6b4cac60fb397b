"""Read a bilinear transformer from its weights: eigenvectors of interactions, and their checks.

`import bilinear_lens as bl`; the names stand in the order in which a newcomer meets them.
"""

from bilinear_lens.models.transformer import HookedBilinearTransformer
from bilinear_lens.models.checkpoints import held_out_stories, load_checkpoint
from bilinear_lens.analysis.interactions import InteractionTable, interactions
from bilinear_lens.analysis.ablation import (
    ablate_eigenvectors,
    ablation_curve,
    k_reaching,
    keep_eigenvectors,
    project_out,
)
from bilinear_lens.analysis.pairs import token_pairs
from bilinear_lens.analysis.sources import source_basis
from bilinear_lens.analysis.attribution import Attribution, attribute
from bilinear_lens.analysis.tracing import trace
from bilinear_lens.analysis.circuits import Circuit
from bilinear_lens.analysis.effects import faithfulness, measure_effects
from bilinear_lens.analysis.sweep import sweep
from bilinear_lens.analysis.search import Summary, Sweep, load_sweep
from bilinear_lens.analysis.overview import overview
from bilinear_lens.models.saes import SparseAutoencoder
from bilinear_lens.training.saes import SaeRecipe, train_saes
from bilinear_lens.training.reconstruction import Reconstruction, evaluate_reconstruction
from bilinear_lens.analysis.features import (
    FeatureInteractions,
    feature_interactions,
    latent_tensor,
)
from bilinear_lens.analysis.feature_summary import feature_summary
from bilinear_lens.analysis.latent_prediction import latent_prediction
from bilinear_lens.analysis.examples import LatentExamples, latent_examples
from bilinear_lens.analysis.latent_ablation import ablate_latents, latent_effects
from bilinear_lens.models.bridges import load_bridge
from bilinear_lens.models.transcoder import BilinearTranscoder
from bilinear_lens.training.transcoders import TranscoderRecipe, train_transcoders
from bilinear_lens.training.text import load_text
from bilinear_lens.training.bilinearize import (
    BilinearizeRecipe,
    bilinearize,
    recommended_arguments,
)
from bilinear_lens.training.bilinearized import bilinearize_checkpoint
from bilinear_lens.training.controls import bilinearize_study, summarize_study
from bilinear_lens.training.language import train_language
from bilinear_lens.training.recipe import LanguageRecipe
from bilinear_lens.training.annealing import GateAnnealing
from bilinear_lens.training.distillation import DistillationLoss
from bilinear_lens.models.hub import push_to_hub
from bilinear_lens.models.classifier import HookedBilinearClassifier
from bilinear_lens.models.layers import ClassifierConfig
from bilinear_lens.training.images import LabelledImages, load_images
from bilinear_lens.analysis.explanation import Explanation, explain_image
from bilinear_lens.analysis.truncation import activation_spectrum, truncation_curve
from bilinear_lens.analysis.factorize import Factorization, factorize
from bilinear_lens.analysis.depth import DiagonalChain, diagonalize
from bilinear_lens.analysis.masks import adversarial_masks, masked_predictions
from bilinear_lens.tensor import BilinearTensor
from bilinear_lens.spectrum import Spectrum
from bilinear_lens.basis import Basis

__all__ = [
    "HookedBilinearTransformer",
    "load_checkpoint",
    "held_out_stories",
    "interactions",
    "InteractionTable",
    "ablate_eigenvectors",
    "keep_eigenvectors",
    "project_out",
    "ablation_curve",
    "k_reaching",
    "token_pairs",
    "source_basis",
    "attribute",
    "Attribution",
    "trace",
    "Circuit",
    "measure_effects",
    "faithfulness",
    "sweep",
    "load_sweep",
    "Sweep",
    "Summary",
    "overview",
    "SparseAutoencoder",
    "train_saes",
    "SaeRecipe",
    "evaluate_reconstruction",
    "Reconstruction",
    "feature_interactions",
    "FeatureInteractions",
    "latent_tensor",
    "feature_summary",
    "latent_prediction",
    "latent_examples",
    "LatentExamples",
    "ablate_latents",
    "latent_effects",
    "load_bridge",
    "BilinearTranscoder",
    "train_transcoders",
    "TranscoderRecipe",
    "load_text",
    "bilinearize",
    "BilinearizeRecipe",
    "bilinearize_checkpoint",
    "recommended_arguments",
    "bilinearize_study",
    "summarize_study",
    "GateAnnealing",
    "DistillationLoss",
    "train_language",
    "LanguageRecipe",
    "push_to_hub",
    "HookedBilinearClassifier",
    "ClassifierConfig",
    "load_images",
    "LabelledImages",
    "explain_image",
    "Explanation",
    "truncation_curve",
    "activation_spectrum",
    "factorize",
    "Factorization",
    "diagonalize",
    "DiagonalChain",
    "adversarial_masks",
    "masked_predictions",
    "BilinearTensor",
    "Spectrum",
    "Basis",
]
