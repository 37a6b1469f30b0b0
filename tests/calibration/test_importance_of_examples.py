"""Importance from examples: against loops over single examples and entries, and what it must leave alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from configured import load
from peft import LoraConfig, get_peft_model
from scored_models import TARGETS, linears
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from partial_lora.calibration import importance
from partial_lora.errors import PartialLoraError
from partial_lora.models.targets import target_linears

MEASURES = {
    "snip": {},
    "activation": {},
    "imp": {"steps": 2, "rounds": 2, "learning_rate": 1e-3},
    "adapter": {"steps": 4, "learning_rate": 1e-2, "rank": 2},
}


class Perceptron(nn.Module):
    """Three layers on 7 features; with dropout, so that training mode is felt."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second, self.head = nn.Linear(7, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs):
        hidden = self.dropout(torch.tanh(self.first(inputs)))
        return self.head(self.dropout(torch.tanh(self.second(hidden))))


@pytest.fixture
def perceptron():
    return Perceptron()


@pytest.fixture
def modules(perceptron):
    return {"first": perceptron.first, "second": perceptron.second}


def draw(sizes=(4, 4, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(sum(sizes), 7, generator=generator) * torch.logspace(-1, 1, 7)
    labels = torch.arange(sum(sizes)) % 3
    return [{"inputs": some, "labels": own} for some, own in zip(inputs.split(sizes), labels.split(sizes), strict=True)]


def scores(name, model, modules, batches, **changes):
    return importance.data_scores(name, model, modules, batches, seed=0, options=MEASURES[name], **changes)


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        for some, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(some, other, **tolerance)


def summed(entries):
    """Row and column sums, entry by entry."""
    rows, columns = entries.shape
    by_row = [sum(float(entries[i, j]) for j in range(columns)) for i in range(rows)]
    by_column = [sum(float(entries[i, j]) for i in range(rows)) for j in range(columns)]
    return torch.tensor(by_row, dtype=torch.float64), torch.tensor(by_column, dtype=torch.float64)


def test_snip_is_the_weight_times_the_slope_of_the_mean_loss(perceptron, modules):
    """The literal twin: every entry nudged up and down, the loss of each single example averaged, in float64."""
    model, step, expected = copy.deepcopy(perceptron).double().eval(), 1e-6, {}
    singles = [
        (inputs[None].double(), label[None]) for batch in draw() for inputs, label in zip(*batch.values(), strict=True)
    ]

    def mean_loss():
        return sum(float(functional.cross_entropy(model(inputs), label)) for inputs, label in singles) / len(singles)

    with torch.no_grad():
        for name in modules:
            weight = model.get_submodule(name).weight
            entries = torch.empty_like(weight)
            for i, j in torch.cartesian_prod(*map(torch.arange, weight.shape)).tolist():
                own = float(weight[i, j])
                weight[i, j] = own + step
                above = mean_loss()
                weight[i, j] = own - step
                below = mean_loss()
                weight[i, j] = own
                entries[i, j] = abs(own * (above - below) / (2 * step))
            expected[name] = summed(entries)
    assert_same(scores("snip", perceptron, modules, draw()), expected, rtol=1e-4, atol=1e-6)


def test_activation_is_the_weight_times_the_norm_of_what_enters(perceptron, modules):
    """The literal twin: one example after the other, its inputs worked out by hand."""
    inputs = torch.cat([batch["inputs"] for batch in draw()])
    weight, bias = perceptron.first.weight.detach(), perceptron.first.bias.detach()
    entering = {"first": inputs, "second": torch.tanh(inputs @ weight.T + bias)}
    expected = {}
    for name, module in modules.items():
        norms = [sum(float(example[j]) ** 2 for example in entering[name]) ** 0.5 for j in range(module.in_features)]
        expected[name] = summed(
            torch.tensor([[abs(w) * x for w, x in zip(row, norms, strict=True)] for row in module.weight.tolist()])
        )
    assert_same(scores("activation", perceptron, modules, draw()), expected, rtol=1e-5, atol=1e-6)


def state(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        [module.training for module in model.modules()],
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", MEASURES)
def test_the_model_is_given_back_bit_for_bit(name, fails, perceptron, modules):
    perceptron.train()
    perceptron.second.eval()
    perceptron.second.weight.requires_grad_(False)
    perceptron(draw()[0]["inputs"]).sum().backward()
    values, gradients, flags = state(perceptron)
    copies = [None if gradient is None else gradient.clone() for _, gradient in gradients]
    calls = []

    def loss(model, batch):
        calls.append(1)
        if fails and len(calls) > 2:
            raise KeyboardInterrupt
        return importance.task_loss(model, batch)

    random_state = torch.get_rng_state()
    if fails:
        with pytest.raises(KeyboardInterrupt):
            scores(name, perceptron, modules, draw(), loss=loss)
    else:
        scores(name, perceptron, modules, draw(), loss=loss)
    after, gradients_after, flags_after = state(perceptron)
    assert all(torch.equal(after[key], values[key]) for key in values)
    for (required, gradient), (before, own), copied in zip(gradients_after, gradients, copies, strict=True):
        assert required == before
        assert gradient is own
        assert gradient is None or torch.equal(gradient, copied)
    assert flags_after == flags
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_pre_hooks for module in perceptron.modules())


@pytest.mark.parametrize("name", MEASURES)
def test_dropout_is_off_and_gradients_are_on_whatever_the_caller_does(name, perceptron, modules):
    expected = scores(name, perceptron.eval(), modules, draw())
    with torch.no_grad():
        assert_same(scores(name, perceptron.train(), modules, draw()), expected)
    for parameter in perceptron.parameters():
        parameter.requires_grad_(False)
    assert_same(scores(name, perceptron, modules, draw()), expected)


@pytest.mark.parametrize("name", MEASURES)
def test_a_module_that_nothing_reaches_is_named(name, perceptron, modules):
    perceptron.spare = nn.Linear(4, 4)
    with pytest.raises(PartialLoraError, match="spare"):
        scores(name, perceptron, modules | {"spare": perceptron.spare}, draw())


@pytest.mark.parametrize("name", MEASURES)
def test_a_model_in_half_precision_scores_nearly_as_in_full(name, perceptron, modules):
    perceptron.to(torch.bfloat16)
    halves = [batch | {"inputs": batch["inputs"].bfloat16()} for batch in draw()]
    found = scores(name, perceptron, modules, halves)
    perceptron.float()
    expected = scores(name, perceptron, modules, [batch | {"inputs": batch["inputs"].float()} for batch in halves])
    for pair, others in zip(found.values(), expected.values(), strict=True):
        for some, other in zip(pair, others, strict=True):
            assert torch.corrcoef(torch.stack([some, other]))[0, 1] > 0.95


@pytest.mark.parametrize("name", MEASURES)
def test_a_vision_transformer_is_scored_by_its_own_loss(name):
    model = load("tiny_vit")
    batch = {"pixel_values": torch.randn(6, 3, 32, 32), "labels": torch.arange(6) % 3}
    modules = target_linears(model, TARGETS)
    config = model.config.to_dict()
    found = scores(name, model, modules, [batch])
    assert model.config.to_dict() == config
    assert list(found) == [name for name in linears(model) if name.endswith(tuple(TARGETS))]
    for pair, module in zip(found.values(), modules.values(), strict=True):
        assert [len(axis) for axis in pair] == list(module.weight.shape)
        assert all(axis.dtype == torch.float64 and axis.min() >= 0 for axis in pair)
    plain = lambda model, batch: functional.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])  # noqa: E731
    assert_same(found, scores(name, model, modules, [batch], loss=plain))


def test_a_model_without_a_loss_needs_labels_of_classes(perceptron, modules):
    for labels in (torch.zeros(3), None):
        batch = {"inputs": torch.ones(3, 7)} | ({} if labels is None else {"labels": labels})
        with pytest.raises(PartialLoraError, match="Perceptron"):
            scores("snip", perceptron, modules, [batch])


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30}


def padded(rows, *, width):
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(rows)) % 2}


ROWS = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]


def test_padding_does_not_count_as_input():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL))
    modules = target_linears(model, ["query", "dense"])
    singles = [padded([row], width=len(row)) | {"labels": torch.tensor([0])} for row in ROWS]
    expected = scores("activation", model, modules, singles)
    for width in (4, 9):
        assert_same(scores("activation", model, modules, [padded(ROWS, width=width)]), expected, rtol=1e-4, atol=1e-5)


def test_what_the_mask_of_an_encoder_says_is_not_said_of_the_decoder():
    """Both see as many tokens here; the decoder's are all real."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    modules = target_linears(model, r"decoder.*SelfAttention\.q")
    batch = padded(ROWS, width=4) | {"labels": torch.tensor([[1, 2, 3, 4]] * 3)}
    seen = []
    hook = next(iter(modules.values())).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    found = scores("activation", model, modules, [batch])
    hook.remove()
    norms = seen[0].flatten(0, 1).double().norm(dim=0)
    for name, module in modules.items():
        torch.testing.assert_close(found[name][1], (module.weight.detach().abs().double() * norms).sum(0))


def test_tokens_are_left_out_only_where_there_is_one_row_a_token():
    entering, mask = torch.arange(24.0).view(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = entering[mask.bool()]
    assert torch.equal(importance.real_tokens(entering, mask), kept)
    assert torch.equal(importance.real_tokens(entering.flatten(0, 1), mask), kept)
    assert torch.equal(importance.real_tokens(entering, None), entering.flatten(0, 1))
    assert torch.equal(importance.real_tokens(entering[:, 0], mask), entering[:, 0])  # a pooled token
    assert len(importance.real_tokens(entering, mask[:, None, None])) == 6  # a mask of pairs of tokens


def imp(model, modules, batches=None, *, seed=0, loss=None, **options):
    batches = draw() if batches is None else batches
    return importance.data_scores("imp", model, modules, batches, seed=seed, options=options, loss=loss)


class Watched:
    """The loss, and what it was asked about: the weights of each step and its examples."""

    def __init__(self, modules):
        self.modules, self.weights, self.batches = modules, [], []

    def __call__(self, model, batch):
        self.weights.append({name: module.weight.detach().clone() for name, module in self.modules.items()})
        self.batches.append(batch)
        return importance.task_loss(model, batch)


def norm(entries):
    return math.sqrt(sum(entry**2 for entry in entries.tolist()))


def literal(model, names, batch, *, rounds, fraction, steps, learning_rate):
    """The slow twin: AdamW written out, on all examples at once; rows and columns fall one at a time."""
    fallen = {name: ([], []) for name in names}
    for _ in range(rounds):
        trained = copy.deepcopy(model).eval()  # rewound
        weights = {name: trained.get_submodule(name).weight for name in names}

        def clear(weights=weights):
            for name, weight in weights.items():
                for row in fallen[name][0]:
                    weight.data[row] = 0
                for column in fallen[name][1]:
                    weight.data[:, column] = 0

        clear()
        first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for step in range(1, steps + 1):
            trained.zero_grad()
            functional.cross_entropy(trained(batch["inputs"]), batch["labels"]).backward()
            for name, weight in weights.items():
                first[name] = 0.9 * first[name] + 0.1 * weight.grad
                second[name] = 0.999 * second[name] + 0.001 * weight.grad**2
                root = (second[name] / (1 - 0.999**step)).sqrt()
                weight.data -= learning_rate * (first[name] / (1 - 0.9**step)) / (root + 1e-8)
            clear()
        for name, weight in weights.items():
            rows = [norm(weight[i]) for i in range(len(weight))]
            columns = [norm(weight[:, j]) for j in range(weight.shape[1])]
            for gone, norms in zip(fallen[name], (rows, columns), strict=True):
                left = len(norms) - len(gone)
                for _ in range(min(max(1, math.floor(fraction * left + 0.5)), left - 1)):
                    candidates = [index for index in range(len(norms)) if index not in gone]
                    gone.append(min(candidates, key=lambda index: (norms[index], -index)))
            last = fallen[name][0], rows, fallen[name][1], columns
            fallen_and_left = []
            for gone, norms in (last[:2], last[2:]):
                left = [index for index in range(len(norms)) if index not in gone]
                fallen_and_left.append([*gone, *sorted(left, key=lambda index: (norms[index], -index))])
            weights[name] = fallen_and_left
        order = weights
    return {
        name: tuple(
            torch.tensor([float(axis.index(i)) for i in range(len(axis))], dtype=torch.float64) for axis in axes
        )
        for name, axes in order.items()
    }


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_imp_is_training_pruning_and_rewinding(rounds, steps, perceptron, modules):
    options = {"rounds": rounds, "fraction": 0.3, "steps": steps, "learning_rate": 0.05}
    (batch,) = draw((11,))
    assert_same(imp(perceptron, modules, [batch], **options), literal(perceptron, list(modules), batch, **options))


@pytest.mark.parametrize("rounds", [1, 3, 20])
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.99])
def test_the_order_is_total(rounds, fraction, perceptron, modules):
    with torch.no_grad():
        perceptron.first.weight[:3] = perceptron.first.weight[0]  # rows alike
        perceptron.second.weight.zero_()
    found = imp(perceptron, modules, rounds=rounds, fraction=fraction, steps=0)
    for axis in (0, 1):
        assert sorted(found["first"][axis].tolist()) == list(range(len(found["first"][axis])))
        size = len(found["second"][axis])
        assert found["second"][axis].tolist() == list(range(size - 1, -1, -1))  # of equals the lower index is kept
    assert found["first"][0][0] > found["first"][0][1] > found["first"][0][2]


def test_examples_are_mixed_and_each_is_seen_before_any_comes_again(perceptron, modules):
    watched = Watched(modules)
    batches = draw((4, 4, 3))
    sorted_by_class = torch.cat([batch["inputs"] for batch in batches])
    imp(perceptron, modules, batches, rounds=1, steps=6, loss=watched)
    first, second = (torch.cat([batch["inputs"] for batch in watched.batches[i : i + 3]]) for i in (0, 3))
    for seen in (first, second):
        assert not torch.equal(seen, sorted_by_class)
        assert sorted(seen[:, 0].tolist()) == sorted(sorted_by_class[:, 0].tolist())
    assert not torch.equal(first, second)
    labels = {tuple(row.tolist()): int(label) for batch in batches for row, label in zip(*batch.values(), strict=True)}
    for batch in watched.batches:
        assert [labels[tuple(row.tolist())] for row in batch["inputs"]] == batch["labels"].tolist()


def drawn_by_peft(perceptron, names, seed, rank):
    """A of every module, as PEFT draws it for a run of that seed."""
    torch.manual_seed(seed)
    own = get_peft_model(copy.deepcopy(perceptron), LoraConfig(r=rank, target_modules=names)).get_base_model()
    return {name: own.get_submodule(name).lora_A["default"].weight.detach().clone() for name in names}


def literally_adapted(perceptron, names, batch, *, seed, rank, alpha, steps, learning_rate):
    """The slow twin: W + alpha / rank B A written out, AdamW too, on all examples at once."""
    model, weights, factors = copy.deepcopy(perceptron).eval(), {}, {}
    drawn = drawn_by_peft(perceptron, names, seed, rank)
    for name, a in drawn.items():
        weights[name] = model.get_submodule(name).weight.detach()
        factors[name] = [torch.zeros(len(weights[name]), rank), a.clone()]
    first = {name: [torch.zeros_like(factor) for factor in pair] for name, pair in factors.items()}
    second = copy.deepcopy(first)
    for step in range(1, steps + 1):
        for pair in factors.values():
            for factor in pair:
                factor.requires_grad_(True)
        whole = {name: weights[name] + alpha / rank * b @ a for name, (b, a) in factors.items()}
        adapted = {f"{name}.weight": weight for name, weight in whole.items()}
        logits = torch.func.functional_call(model, adapted, (batch["inputs"],))
        functional.cross_entropy(logits, batch["labels"]).backward()
        for name, pair in factors.items():
            for place, factor in enumerate(pair):
                first[name][place] = 0.9 * first[name][place] + 0.1 * factor.grad
                second[name][place] = 0.999 * second[name][place] + 0.001 * factor.grad**2
                root = (second[name][place] / (1 - 0.999**step)).sqrt()
                update = first[name][place] / (1 - 0.9**step) / (root + 1e-8)
                pair[place] = (factor - learning_rate * update).detach()
    return {
        name: (
            torch.tensor([norm(row) for row in b], dtype=torch.float64),
            torch.tensor([norm(column) for column in (a - drawn[name]).T], dtype=torch.float64),
        )
        for name, (b, a) in factors.items()
    }


@pytest.mark.parametrize("steps", [1, 5])
def test_the_adapter_that_is_scored_is_a_dense_one_trained_briefly(steps, perceptron, modules):
    options = {"rank": 3, "alpha": 6.0, "steps": steps, "learning_rate": 0.02}
    (batch,) = draw((11,))
    found = importance.data_scores("adapter", perceptron, modules, [batch], seed=5, options=options)
    expected = literally_adapted(perceptron, list(modules), batch, seed=5, **options)
    assert_same(found, expected, rtol=1e-4, atol=1e-6)


def test_no_trace_of_the_adapter_stays(perceptron, modules, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the numbers of a GPU were drawn anew"))
    parts = dict(perceptron.named_modules())
    scores("adapter", perceptron, modules, draw())
    with pytest.raises(PartialLoraError, match=r"^importance=adapter: "):
        scores(
            "adapter", perceptron, modules, draw(), loss=lambda model, batch: model(batch["inputs"]).sum() * math.nan
        )
    assert dict(perceptron.named_modules()) == parts
    assert not hasattr(perceptron, "peft_config")


def test_batches_of_other_lengths_stay_whole():
    batches = [{"input_ids": torch.full((2, length), length)} for length in (3, 4, 5)]
    shuffled = importance._shuffled(batches, torch.Generator().manual_seed(0))
    assert sorted(batch["input_ids"].shape[1] for batch in shuffled) == [3, 4, 5]


def test_equal_seeds_agree_and_others_see_the_examples_in_another_order(perceptron, modules):
    options = {"steps": 3, "learning_rate": 0.05}
    assert_same(
        imp(perceptron, modules, seed=1, **options), imp(perceptron, modules, seed=1, **options), atol=0, rtol=0
    )
    seen = [Watched(modules) for _ in range(2)]
    for seed, watched in enumerate(seen):
        imp(perceptron, modules, seed=seed, loss=watched, **options)
    assert not torch.equal(seen[0].batches[0]["inputs"], seen[1].batches[0]["inputs"])


def test_training_that_diverges_is_refused_and_leaves_the_model_alone(perceptron, modules):
    before = perceptron.first.weight.detach().clone()
    with pytest.raises(PartialLoraError, match=r"first .*importance\.learning_rate"):
        imp(perceptron, modules, steps=2, loss=lambda model, batch: model(batch["inputs"]).sum() * math.nan)
    assert torch.equal(perceptron.first.weight, before)
