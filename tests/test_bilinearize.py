"""From a gated model to a bilinear one: what changes, what stays, what resumes, what is refused."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from models import gated, loaded_with_report, random_model, some_tokens
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import bilinear_lens as bl
from bilinear_lens.training import runs
from bilinear_lens.training.annealing import SCHEDULES, GateAnnealing
from bilinear_lens.training.bilinearize import BilinearizeRecipe, bilinearize
from bilinear_lens.training.gates import gated_mlps, is_bilinear, least_squares_shifts
from bilinear_lens.training.runs import last_checkpoint
from bilinear_lens.training.text import in_memory, train_tokenizer

EVERYTHING = BilinearizeRecipe(
    anneal=0.8,
    schedule="cosine",
    layer_by_layer=True,
    learn_scale=True,
    least_squares=True,
    distill=0.5,
)
VOCAB = 300


def windows(n: int = 40, seed: int = 7, length: int = 12) -> Dataset:
    """Tokens that go round in a circle, each window from another one."""
    starts = torch.randint(0, 36, (n, 1), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"input_ids": ((starts + torch.arange(length)) % 36 + 1).tolist()})


def arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "max_steps": 6,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**settings, **changes})


def llama() -> Any:
    return random_model(gated("llama"))


def convert(
    folder, dataset=None, *, model=None, recipe=EVERYTHING, args: Any = None, **options: Any
) -> Any:
    """`bilinearize` with the settings of these tests."""
    return bilinearize(
        llama() if model is None else model,
        windows() if dataset is None else dataset,
        recipe=recipe,
        args=arguments(folder, **(args or {})),
        **options,
    )


def state(model) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_same_weights(a, b, *, atol: float = 0.0, rtol: float = 0.0) -> None:
    ours, theirs = (each if isinstance(each, dict) else each.state_dict() for each in (a, b))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=atol, rtol=rtol)


def logged(folder: Path) -> list[dict[str, float]]:
    last = last_checkpoint(folder)
    assert last is not None
    rows = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [{name: row[name] for name in ("step", "loss", "grad_norm")} for row in rows]


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.rows: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.rows.append(logs["loss"])


class Stopped(Exception):
    """In place of a power cut."""


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stopped


@pytest.mark.parametrize("name", ["llama-biases", "phi3", "gemma2-tied"])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_another_one_and_the_original_stays(name, training, tmp_path):
    model = random_model(gated(name)).train(training)
    model.lm_head.requires_grad_(False)  # pyright: ignore[reportCallIssue]
    before, config = state(model), model.config.to_dict()
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    asked = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        expected = model(some_tokens()).logits
    ours = convert(tmp_path / "run", model=model)
    assert_same_weights(model, before)
    assert model.config.to_dict() == config
    assert [(name, type(m), m.training) for name, m in model.named_modules()] == modules
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert model(some_tokens()).logits.equal(expected)

    assert is_bilinear(ours) and not ours.training
    assert ours.config.use_cache == model.config.use_cache
    assert [p.requires_grad for p in ours.parameters()] == asked
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in ours.modules())
    ours.save_pretrained(tmp_path / "model")
    loaded, report = loaded_with_report(tmp_path / "model")
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert loaded(some_tokens()).logits.equal(ours(some_tokens()).logits)
        assert not torch.allclose(ours(some_tokens()).logits, expected, atol=1e-2)
    hooked = bl.HookedBilinearTransformer.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        log_probs = hooked(some_tokens()).log_softmax(-1)
        torch.testing.assert_close(
            log_probs, ours(some_tokens()).logits.log_softmax(-1), atol=1e-4, rtol=0
        )


def test_a_bilinear_model_is_returned_as_it_is(tmp_path):
    model = random_model(gated("llama", hidden_act="linear"))
    with pytest.warns(UserWarning, match="LlamaForCausalLM is bilinear already"):
        assert convert(tmp_path / "run", model=model) is model
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["gate", "mlp", "all"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_what_was_asked_for_is_trained(part, checkpointing, tmp_path):
    model = random_model(gated("llama-biases"))
    recipe = BilinearizeRecipe(train=part, anneal=0.5, distill=0.5)
    args = {"gradient_checkpointing": checkpointing}
    ours = convert(tmp_path / "run", model=model, recipe=recipe, args=args).state_dict()
    for name, weight in model.state_dict().items():
        trained = {"gate": "gate_proj" in name, "mlp": ".mlp." in name, "all": True}[part]
        assert weight.equal(ours[name]) != trained


def test_phi3_s_gate_is_trained_with_what_shares_its_weight(tmp_path):
    model = random_model(gated("phi3"))
    recipe = BilinearizeRecipe(train="gate", anneal=0.5)
    ours = convert(tmp_path / "run", model=model, recipe=recipe).state_dict()
    changed = {name for name, w in model.state_dict().items() if not w.equal(ours[name])}
    assert changed == {f"model.layers.{layer}.mlp.gate_up_proj.weight" for layer in range(3)}


@pytest.mark.parametrize("least_squares", [False, True])
def test_gates_can_be_replaced_at_once(least_squares, tmp_path):
    """The first step's loss is that of the linear gates."""
    recipe = BilinearizeRecipe(anneal=0.0, least_squares=least_squares, distill=0.0)
    losses, model = Losses(), llama()
    dataset = windows(8)
    convert(
        tmp_path / "run",
        dataset,
        model=model,
        recipe=recipe,
        args={"max_steps": 2, "per_device_train_batch_size": 8},
        callbacks=[losses],
    )
    tokens = dataset.with_format("torch")[:]["input_ids"]
    with torch.no_grad():
        whole = model(tokens, labels=tokens).loss.item()
        if least_squares:
            shifts = least_squares_shifts(model, tokens)
            for mlp, shift in zip(gated_mlps(model), shifts, strict=True):
                mlp.gate.weight.add_(shift)
        for mlp in gated_mlps(model):
            setattr(mlp.module, mlp.activation, torch.nn.Identity())
            mlp.gate.weight.div_(2)
        expected = model(tokens, labels=tokens).loss.item()
    assert losses.rows[0] == pytest.approx(expected, abs=2e-4)
    assert abs(expected - whole) > 1e-3


def test_a_model_learns_while_its_gates_become_linear(tmp_path):
    model = llama()
    args = {"max_steps": 60, "learning_rate": 1e-2, "logging_steps": 60}
    ours = convert(
        tmp_path / "run", model=model, recipe=replace(EVERYTHING, distill=0.0), args=args
    )
    tokens = windows(20, seed=8).with_format("torch")[:]["input_ids"]
    with torch.no_grad():
        losses = [each(tokens, labels=tokens).loss.item() for each in (model, ours)]
    assert losses[0] > 3 and losses[1] < 0.5 * losses[0]


def test_windows_need_no_labels_and_may_be_a_stream(tmp_path):
    def stream():
        yield from windows()

    labelled = windows().map(lambda row: {"labels": row["input_ids"]})
    expected = convert(tmp_path / "labels", labelled)
    assert_same_weights(convert(tmp_path / "none"), expected)
    in_order = [convert(tmp_path / name, IterableDataset.from_generator(stream)) for name in "ab"]
    assert_same_weights(*in_order)
    for name, source in (("stream", windows().to_iterable_dataset()),):
        assert_same_weights(convert(tmp_path / name, source), in_order[0])
    # masked labels are heeded
    half = labelled.map(lambda row: {"labels": [-100] * 6 + row["labels"][6:]})
    other = convert(tmp_path / "half", half)
    assert not other.lm_head.weight.equal(expected.lm_head.weight)


def test_a_stream_shorter_than_the_run_begins_again(tmp_path):
    losses = Losses()
    short = windows(8).to_iterable_dataset()
    convert(tmp_path / "run", short, args={"max_steps": 7}, callbacks=[losses])
    assert len(losses.rows) == 7


def test_all_runs_read_a_stream_in_the_same_order(tmp_path):
    read: dict[str, list] = {"ours": [], "control": []}

    class Reads(TrainerCallback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
            def keep(module, args, kwargs) -> None:
                read[self.name].append(kwargs["input_ids"].tolist())

            model.register_forward_pre_hook(keep, with_kwargs=True)  # pyright: ignore[reportOptionalMemberAccess]

    stream = windows().to_iterable_dataset().with_format("torch")
    recipe = replace(EVERYTHING, distill=0.0)
    convert(tmp_path / "ours", stream, recipe=recipe, callbacks=[Reads("ours")])
    control, args = [Reads("control")], arguments(tmp_path / "control")
    runs.train(llama(), stream, args=args, note={}, callbacks=control)
    assert read["ours"] == read["control"] and len(read["ours"]) == 6
    in_order = [row.tolist() for row in windows().with_format("torch")[:4]["input_ids"]]
    assert read["ours"][0] != in_order


def test_accumulation_and_checkpointing_change_nothing(tmp_path):
    plain = convert(tmp_path / "plain")
    ways: dict[str, dict[str, Any]] = {
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "checkpointed": {"gradient_checkpointing": True},
    }
    for name, args in ways.items():
        assert_same_weights(convert(tmp_path / name, args=args), plain, atol=2e-5, rtol=1e-4)
    other = convert(tmp_path / "other", args={"per_device_train_batch_size": 2})
    assert not torch.allclose(other.lm_head.weight, plain.lm_head.weight, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_16_bits_run(dtype, tmp_path):
    """Weights of 16 bits, and of 32 with 16 bits in between."""
    losses, plain = Losses(), Losses()
    recipe = replace(EVERYTHING, least_squares=False)
    ours = convert(
        tmp_path / "half",
        model=llama().to(dtype),
        recipe=recipe,
        args={"bf16": True},
        callbacks=[losses],
    )
    assert {p.dtype for p in ours.parameters()} == {dtype}
    assert "forward" not in vars(ours)  # the Trainer's, which rounds to 16 bits
    convert(tmp_path / "whole", recipe=recipe, callbacks=[plain])
    assert losses.rows == pytest.approx(plain.rows, abs=0.05)
    hooked = bl.HookedBilinearTransformer.from_hf(ours.float())
    assert hooked(some_tokens()).isfinite().all()


def test_held_out_text_is_evaluated_as_the_arguments_say(tmp_path):
    seen: list[float] = []

    class Evaluated(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            assert metrics is not None
            seen.append(metrics["eval_loss"])

    convert(
        tmp_path / "run",
        recipe=BilinearizeRecipe(),
        args={"eval_strategy": "steps", "eval_steps": 2},
        eval_dataset=windows(5, seed=9),
        callbacks=[Evaluated()],
    )
    assert len(seen) == 3 and all(math.isfinite(loss) for loss in seen)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    stories = in_memory(bl.held_out_stories()[:30])
    return train_tokenizer(stories, vocab_size=VOCAB, n_ctx=32)


@pytest.fixture(scope="module")
def bigrams(tokenizer) -> Any:
    """A model that knows which token follows which in the stories, and nothing else."""
    size = 304
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=size,
        intermediate_size=28,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    counts = torch.full((VOCAB, VOCAB), 2e-3)
    for story in bl.held_out_stories()[:40]:
        ids = torch.tensor([0, *tokenizer(story)["input_ids"]])
        counts.index_put_((ids[:-1], ids[1:]), torch.ones(()), accumulate=True)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB, size))
        log_probs = (counts / counts.sum(1, keepdim=True)).log()
        model.lm_head.weight.zero_()[:, :VOCAB] = log_probs.mT / size**0.5
    return model


def test_documents_become_windows_of_the_tokenizer_s(tokenizer, bigrams, tmp_path):
    stories = bl.held_out_stories()[30:36]
    losses, by_hand = Losses(), Losses()
    options: dict[str, Any] = {"model": bigrams, "recipe": BilinearizeRecipe()}
    documents = Dataset.from_dict({"text": stories, "number": list(range(6))})
    text = convert(
        tmp_path / "text", documents, tokenizer=tokenizer, n_ctx=17, callbacks=[losses], **options
    )
    ids = [each for story in stories for each in (0, *tokenizer(story)["input_ids"])]
    cut = [ids[i : i + 17] for i in range(0, len(ids) - 16, 17)]
    tokens = convert(
        tmp_path / "ids", Dataset.from_dict({"input_ids": cut}), callbacks=[by_hand], **options
    )
    assert losses.rows == by_hand.rows
    assert losses.rows[0] < 0.8 * math.log(VOCAB)
    assert_same_weights(text, tokens)


def test_a_cut_off_run_resumes_to_the_same_model(tmp_path):
    """With a checkpoint that was being written, which is passed over; at its end, it is done."""
    args = {"max_steps": 9, "save_strategy": "steps", "save_steps": 2, "bf16": True}
    whole = convert(tmp_path / "whole", args=args)
    with pytest.raises(Stopped):
        convert(tmp_path / "cut", args=args, callbacks=[StopAfter(5)])
    last = last_checkpoint(tmp_path / "cut")
    assert last is not None and last.name == "checkpoint-4"
    newest = shutil.copytree(last, tmp_path / "cut" / "checkpoint-6")
    (newest / "trainer_state.json").unlink()
    (newest / "model.safetensors").write_bytes(b"cut off")
    assert last_checkpoint(tmp_path / "cut") == last

    with pytest.raises(ValueError, match=r"cut holds an unfinished run.*resume=True"):
        convert(tmp_path / "cut", args=args)
    others: dict[str, dict[str, Any]] = {
        "recipe": {"recipe": replace(EVERYTHING, schedule="linear")},
        "model": {"model": random_model(gated("llama"), seed=1)},
        "text": {"dataset": windows(seed=8)},
        "learning_rate": {"args": {**args, "learning_rate": 2e-3}},
        "max_steps": {"args": {**args, "max_steps": 10}},
    }
    for name, change in others.items():
        with pytest.raises(ValueError, match=rf"another run: {name}( \(.*, not .*\))? differ"):
            convert(tmp_path / "cut", **{"args": args, "resume": True, **change})

    steps = Losses()
    resumed = convert(tmp_path / "cut", args=args, resume=True, callbacks=[steps])
    assert len(steps.rows) == 5
    assert_same_weights(resumed, whole)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    again = Losses()
    done = convert(tmp_path / "whole", args=args, resume=True, callbacks=[again])
    assert len(again.rows) == 1  # from the checkpoint of step 8
    assert_same_weights(done, whole)


def test_a_run_that_was_killed_resumes_to_the_same_model(tmp_path):
    args = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2}
    whole = convert(tmp_path / "whole", args=args)
    script = tmp_path / "killed.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_bilinearize import TrainerCallback, convert\n"
        "class Slow(TrainerCallback):\n"
        "    def on_step_end(self, args, state, control, **kwargs):\n"
        "        time.sleep(0.3)\n"
        f"convert(sys.argv[1], args={args!r}, callbacks=[Slow()])\n"
    )
    command = [sys.executable, script, tmp_path / "killed"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and last_checkpoint(tmp_path / "killed") is None:
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    last = last_checkpoint(tmp_path / "killed")
    assert last is not None
    weights = load_file(last / "model.safetensors")
    betas = [weight.item() for name, weight in weights.items() if name.endswith("beta")]
    assert len(betas) == 3 and any(beta > 0 for beta in betas)  # in the middle of the annealing
    resumed = convert(tmp_path / "killed", args=args, resume=True)
    assert_same_weights(resumed, whole)
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    # a run that goes on without what the checkpoint says of the gates would be another
    with torch.no_grad():
        assert not weights["lm_head.weight"].equal(whole.lm_head.weight)


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_what_was_good(tmp_path, monkeypatch):
    class Failing(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
            return loss * math.nan if self.state.global_step == 5 else loss

    args = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(runs, "Trainer", Failing)
        with pytest.raises(
            ValueError, match=r"not finite after 5 steps.*/checkpoint-4\."
        ) as caught:
            convert(tmp_path / "run", args=args)
    last = last_checkpoint(tmp_path / "run")
    assert last is not None and f"good checkpoint is {last}" in str(caught.value)
    assert all(weight.isfinite().all() for weight in load_file(last / "model.safetensors").values())
    assert_same_weights(
        convert(tmp_path / "run", args=args, resume=True), convert(tmp_path / "whole", args=args)
    )


def test_an_absurd_learning_rate_is_named(tmp_path):
    args = {"learning_rate": 1e30, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    with pytest.raises(ValueError, match=r"learning rate 1e\+30\. No good one.*lower learning"):
        convert(tmp_path / "run", args=args)


def test_a_checkpoint_with_weights_that_are_no_good_is_not_called_good(tmp_path):
    """Of the step whose update took the weights too far: its gradient was finite."""
    args = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "save_strategy": "steps"}
    with pytest.raises(ValueError, match=r"not finite after 1 steps.*No good one was saved yet"):
        convert(tmp_path / "run", args={**args, "learning_rate": 1e19, "save_steps": 1})
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"
    assert last_checkpoint(tmp_path / "run", before=1) is None


def fault(folder, dataset=None, **options) -> str:
    with pytest.raises(ValueError) as caught:
        convert(folder, dataset, **options)
    return str(caught.value)


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda *args, **kwargs: pytest.fail("work has begun"))


@pytest.mark.usefixtures("no_training", "as_users")
def test_recipes_out_of_range_are_refused():
    changes: list[tuple[dict[str, Any], str]] = [
        ({"schedule": "steep"}, "'steep'.*linear, cosine"),
        ({"schedule": "cosine"}, "schedule='cosine'.*anneal=0 gates are not annealed"),
        ({"layer_by_layer": True}, "layer_by_layer=True.*anneal=0 gates are not annealed"),
        ({"anneal": 1.5}, r"1\.5 must be a share"),
        ({"anneal": -0.1}, "-0.1 must be a share"),
        ({"anneal": math.nan}, "nan must be a share"),
        ({"distill": 2.0}, r"distillation, 2\.0 to"),
        ({"distill": -1.0}, "distillation, -1.0 to"),
        ({"distill": math.nan}, "distillation, nan to"),
        ({"train": "attention"}, "train='attention'.*'gate'"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            BilinearizeRecipe(**change)
    with pytest.raises(ValueError, match=r"7 must be a share.*from 0 to 1"):
        GateAnnealing(llama(), share=7)
    with pytest.raises(ValueError, match=", ".join(SCHEDULES)):
        GateAnnealing(llama(), share=0.5, schedule="steep")


@pytest.mark.usefixtures("no_training")
def test_data_that_cannot_be_trained_on_is_refused(tokenizer, bigrams, tmp_path, monkeypatch):
    text = Dataset.from_dict({"text": bl.held_out_stories()[30:33]})
    other = text.rename_column("text", "story")
    given: dict[str, Any] = {"model": bigrams, "tokenizer": tokenizer, "n_ctx": 16}
    folder = tmp_path / "run"
    assert "columns ['story']" in fault(folder, other)
    assert "only ['story']" in fault(folder, other, **given)
    assert "columns ['text']" in fault(folder, text)
    assert "only ['story']" in fault(folder, other.to_iterable_dataset(), **given)
    assert "no window" in fault(folder, Dataset.from_dict({"input_ids": []}))
    short = Dataset.from_dict({"text": ["A cat."]})
    assert "one window of n_ctx=16" in fault(folder, short, **given)
    assert "max_position_embeddings=32" in fault(folder, text, **{**given, "n_ctx": 5000})
    assert "one window" in fault(folder, Dataset.from_dict({"text": [""]}), **given)
    assert "no window" in fault(folder, short.to_iterable_dataset(), **given)
    assert "have 1 tokens" in fault(folder, windows(length=1))
    uneven = Dataset.from_dict({"input_ids": [[1, 2, 3], [1, 2]]})
    assert "from 2 to 3 tokens: they must be equally long" in fault(folder, uneven)
    for strange in (37, -1):  # in the last of many
        tokens = Dataset.from_dict({"input_ids": [*windows(20)[:]["input_ids"], [strange] * 12]})
        assert "tokens from" in (said := fault(folder, tokens)) and "the model has 37" in said
    masks = [[1] * 12] * 39 + [[1] * 6 + [0] * 6]
    padded = windows().add_column("attention_mask", masks)  # pyright: ignore[reportCallIssue]
    assert "have pads" in fault(folder, padded)
    assert "vocab_size=37" in fault(folder, text, tokenizer=tokenizer, n_ctx=16)
    broken = llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    assert "NaN" in fault(folder, model=broken)
    assert not folder.exists()


@pytest.mark.usefixtures("no_training")
def test_arguments_that_leave_nothing_to_do_are_refused(tmp_path, monkeypatch):
    changes: list[tuple[dict[str, Any], str]] = [
        ({"max_steps": 0}, "max_steps=0"),
        ({"max_steps": -1, "num_train_epochs": 0.0}, "num_train_epochs=0"),
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0 must be above 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
    ]
    for change, message in changes:
        assert re.search(message, fault(tmp_path / "run", args=change))
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    assert "sees 2 GPUs" in fault(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_training")
def test_a_tokenizer_with_other_ids_is_refused(tokenizer, bigrams, tmp_path):
    """Of the same size, so that only the model's loss tells."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["model"]["vocab"] = {
        token: id and (id + 7) % (VOCAB - 1) + 1 for token, id in settings["model"]["vocab"].items()
    }
    permuted = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings)),
        bos_token=tokenizer.bos_token,
    )
    text = Dataset.from_dict({"text": bl.held_out_stories()[30:33]})
    options: dict[str, Any] = {"model": bigrams, "n_ctx": 32}
    said = fault(tmp_path / "run", text, tokenizer=permuted, **options)
    assert "worse than a guess (5.70): the tokenizer is not the model's" in said
    with pytest.raises(pytest.fail.Exception, match="work has begun"):
        convert(tmp_path / "run", text, tokenizer=tokenizer, **options)


@pytest.mark.usefixtures("no_training")
def test_folders_in_the_way_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    (tmp_path / "file").write_text("")
    assert "full is in use and holds no unfinished run" in fault(tmp_path / "full")
    assert "full is in use" in fault(tmp_path / "full", resume=True)
    assert "Cannot write" in fault(tmp_path / "file" / "run")
    assert "Cannot write" in fault(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "thesis.txt"]


@pytest.mark.usefixtures("no_training")
def test_shifts_of_weights_that_fsdp_spreads_are_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        said = fault(tmp_path / "run", args={"fsdp": True})
        assert "least_squares=False, anneal=0, or no FSDP" in said
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        assert fault(tmp_path / "run") == said
    model = llama()
    shifts = least_squares_shifts(model, torch.ones(2, 5, dtype=torch.long))
    annealing = GateAnnealing(model, share=0.5, shifts=shifts)
    states: Any = None, None
    with pytest.raises(ValueError, match="FSDP"):  # in a Trainer of one's own
        annealing.on_train_begin(arguments(tmp_path, fsdp=True), *states)
    annealing.on_train_begin(arguments(tmp_path), *states)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("least_squares", [False, True])
def test_models_without_gates_to_anneal_are_refused(least_squares, tmp_path):
    sizes: dict[str, Any] = {"vocab_size": 37, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2Config(n_positions=32, n_embd=24, n_layer=3, n_head=4, **sizes)
    mixtral = MixtralConfig(
        hidden_size=24,
        intermediate_size=28,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        **sizes,
    )
    mish = gated("llama", hidden_act="mish")
    recipe = BilinearizeRecipe(least_squares=least_squares)
    for config, said in ((gpt2, "0 gated MLPs"), (mixtral, "3 mixtures"), (mish, "'mish'")):
        assert said in fault(tmp_path / "run", model=random_model(config), recipe=recipe)
    assert not (tmp_path / "run").exists()
