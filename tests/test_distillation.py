"""The distillation loss: against a plain computation, in the Trainer, and what it leaves alone."""

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import gated, random_model, some_tokens
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers import default_data_collator as collator

from bilinear_lens.training.annealing import GateAnnealing
from bilinear_lens.training.distillation import DistillationLoss
from bilinear_lens.training.gates import is_bilinear


def models() -> tuple[Any, Any]:
    """A student in training and a teacher, with weights of their own."""
    student, teacher = random_model(gated("llama")), random_model(gated("llama-biases"), seed=1)
    return student.train(), teacher


def some_labels(tokens: torch.Tensor) -> torch.Tensor:
    labels = tokens.clone()
    labels[0, :4] = labels[1, 7] = -100
    return labels


def plain_loss(student, teacher, tokens, labels, weight: float, mask=None) -> torch.Tensor:
    """One position at a time."""
    ours, theirs = (
        model(tokens, attention_mask=mask).logits.softmax(-1) for model in (student, teacher)
    )
    total, n = torch.zeros(()), 0
    for row in range(len(tokens)):
        for position in range(tokens.shape[1] - 1):
            target = labels[row, position + 1]
            if target == -100:
                continue
            p, q = theirs[row, position].detach(), ours[row, position]
            total = total + weight * (p * (p.log() - q.log())).sum()
            total = total - (1 - weight) * q[target].log()
            n += 1
    return total / n


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_the_loss_is_a_plain_sum_of_divergence_and_surprise(weight):
    student, teacher = models()
    tokens = some_tokens()
    labels = some_labels(tokens)
    loss = DistillationLoss(student, teacher, weight=weight)
    ours = loss(student(input_ids=tokens), labels)
    expected = plain_loss(student, teacher, tokens, labels, weight)
    torch.testing.assert_close(ours, expected)
    n = int((labels[:, 1:] != -100).sum())
    ours = loss(student(input_ids=tokens), labels, num_items_in_batch=3 * n)
    torch.testing.assert_close(ours, expected / 3)
    other = plain_loss(student, teacher, tokens, tokens, weight)
    assert abs(other - expected) > 1e-3  # the ignored labels matter
    gradient = torch.autograd.grad(loss(student(tokens), labels), student.lm_head.weight)
    expected = torch.autograd.grad(
        plain_loss(student, teacher, tokens, labels, weight), student.lm_head.weight
    )
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_a_teacher_of_its_own_predictions_costs_nothing():
    student, _ = models()
    loss = DistillationLoss(student, copy.deepcopy(student), weight=1.0)
    assert loss(student(some_tokens()), some_tokens()).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_the_teacher_stays_as_it_is(training):
    """Its dropout is off while it teaches, and it is in its own mode again after."""
    config = gated("llama", attention_dropout=0.5)
    student, teacher = random_model(gated("llama")).train(), random_model(config, seed=1)
    teacher.model.layers[0].requires_grad_(False)  # pyright: ignore
    before = copy.deepcopy(teacher).train(training)
    teacher.train(training)
    loss = DistillationLoss(student, teacher, weight=1.0)
    losses = [loss(student(some_tokens()), some_tokens()) for _ in range(2)]
    assert losses[0].equal(losses[1])
    losses[0].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    assert teacher.training == training
    assert [m.training for m in teacher.modules()] == [m.training for m in before.modules()]
    for ours, theirs in zip(teacher.parameters(), before.parameters(), strict=True):
        assert ours.equal(theirs) and ours.requires_grad == theirs.requires_grad


def test_the_teacher_reads_what_the_student_reads():
    """By position or by name, with its mask; and nothing more once the hook is gone."""
    student, teacher = models()
    tokens = some_tokens()
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    loss = DistillationLoss(student, teacher, weight=1.0)
    by_name = loss(student(input_ids=tokens, attention_mask=mask), labels)
    by_position = loss(student(tokens, mask), labels)
    torch.testing.assert_close(by_position, by_name)
    torch.testing.assert_close(by_name, plain_loss(student, teacher, tokens, labels, 1.0, mask))
    without = loss(student(tokens), labels)
    assert abs(without - by_name) > 1e-3
    loss.detach()
    assert not student._forward_pre_hooks
    student(tokens.roll(3, dims=1))
    torch.testing.assert_close(loss(student(tokens), labels), without)


@pytest.mark.parametrize("weight", [-0.5, 1.5, float("nan")])
def test_a_weight_out_of_range_is_refused(weight):
    student, teacher = models()
    with pytest.raises(ValueError, match=rf"{weight} to {weight}, must be from 0 to 1"):
        DistillationLoss(student, teacher, weight=weight)
    assert not student._forward_pre_hooks


def test_evaluation_is_of_the_language_model_alone():
    student, teacher = models()
    tokens = some_tokens()
    loss = DistillationLoss(student, teacher, weight=1.0)
    taught = loss(student(tokens), tokens)
    student.eval()
    torch.testing.assert_close(loss(student(tokens), tokens), student(tokens, labels=tokens).loss)
    assert abs(taught - student(tokens, labels=tokens).loss) > 1e-3


def test_the_teacher_computes_in_the_students_precision():
    student, teacher = models()
    loss = DistillationLoss(student, teacher, weight=1.0)
    seen = []
    teacher.lm_head.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            outputs = student(some_tokens())
        loss(outputs, some_tokens())
    assert seen == [torch.float32, torch.bfloat16]


def test_the_weight_falls_along_a_straight_line():
    student, teacher = models()
    unread: Any = None
    loss = DistillationLoss(student, teacher, weight=0.8, end=0.2)
    weights = []
    for step in (0, 1, 2, 3):
        loss.on_step_begin(unread, TrainerState(global_step=step, max_steps=3), unread)
        weights.append(loss.weight)
    assert weights == pytest.approx([0.8, 0.6, 0.4, 0.2])
    constant = DistillationLoss(student, teacher, weight=0.8)
    constant.on_step_begin(unread, TrainerState(global_step=2, max_steps=3), unread)
    assert constant.weight == 0.8


def test_no_weight_is_no_distillation():
    with pytest.raises(ValueError, match="leave the loss out"):
        DistillationLoss(*models(), weight=0.0)
    DistillationLoss(*models(), weight=0.0, end=0.5)


def test_a_teacher_of_another_vocabulary_is_refused():
    student, _ = models()
    teacher = random_model(gated("llama", vocab_size=41))
    with pytest.raises(ValueError, match="teacher has 41 tokens, the student 37"):
        DistillationLoss(student, teacher, weight=0.5)


class Gradients(TrainerCallback):
    """Keeps the gradient of each step, and the betas it was taken at."""

    def __init__(self, annealing: GateAnnealing | None = None) -> None:
        self.annealing = annealing
        self.seen: list[dict[str, torch.Tensor]] = []
        self.betas: list[list[float]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.seen.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        if self.annealing:
            self.betas.append([mlp.annealed.beta.item() for mlp in self.annealing.mlps])


def rows(n: int, *, ignored: bool = True) -> Dataset:
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(1, 37, (n, 11), generator=generator)
    labels = tokens.clone()
    if ignored:  # each row another number of them
        for row, label in enumerate(labels):
            label[: 1 + 2 * (row % 4)] = -100
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})


def arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "max_steps": 1,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return TrainingArguments(output_dir=str(folder), **{**settings, **changes})


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path):
    gradients = []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        student, teacher = models()
        kept = Gradients()
        args = arguments(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        Trainer(
            model=student,
            args=args,
            train_dataset=rows(4),  # pyright: ignore[reportArgumentType]
            data_collator=collator,
            callbacks=[kept],
            compute_loss_func=DistillationLoss(student, teacher, weight=0.5),
        ).train()
        gradients.append(kept.seen[0])
    student, teacher = models()
    table = rows(4).with_format("torch")[:]
    plain_loss(student, teacher, table["input_ids"], table["labels"], 0.5).backward()
    expected = {name: p.grad for name, p in student.named_parameters()}
    for gradient in gradients:
        assert gradient.keys() == expected.keys()
        for name, each in gradient.items():
            torch.testing.assert_close(each, expected[name], atol=1e-6, rtol=1e-4)


def test_callback_and_loss_work_in_a_trainer_of_one_s_own(tmp_path):
    student, teacher = random_model(gated("qwen2-tied")), random_model(gated("qwen2-tied"))
    annealing = GateAnnealing(student, share=0.5, schedule="cosine", learn_scale=True)
    kept = Gradients(annealing)
    loss = DistillationLoss(student, teacher, weight=0.5)
    trainer = Trainer(
        model=student,
        args=arguments(tmp_path, max_steps=8, per_device_train_batch_size=3),
        train_dataset=rows(24, ignored=False),  # pyright: ignore[reportArgumentType]
        data_collator=collator,
        callbacks=[annealing, kept],
        compute_loss_func=loss,
    )
    trainer.train()
    expected = torch.tensor([annealing.beta(step / 8, 0) for step in range(8)])
    assert expected[0] == 1 and (expected[4:] == 0).all()
    for layer in zip(*kept.betas, strict=True):
        torch.testing.assert_close(torch.tensor(layer), expected)
    assert any("act_fn.excess" in name for name in kept.seen[0])
    assert not torch.allclose(annealing.mlps[0].annealed.scale, torch.ones(()), atol=1e-5)
    loss.detach()
    annealed = student.eval()(some_tokens()).logits
    folded = annealing.fold()
    assert folded is student and is_bilinear(folded)
    torch.testing.assert_close(folded(some_tokens()).logits, annealed, atol=1e-5, rtol=1e-5)
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 8
