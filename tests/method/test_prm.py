"""The process reward model: where a step ends, its loss, what is counted, the rows.

The loop as a whole is proven in test_sft_reward_loop.py.
"""
import functools
import itertools
import json
import math
import random

import pytest
import torch
from conftest import ROOT, SHARED, run_args
from hypothesis import given
from hypothesis import strategies as st
from test_templates import FAMILIES, QUICK, tokenizer_of
from torch import nn
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

import common
import prm

PROCESS = functools.partial(prm.encode_solution, outcome=False)
ASK = [{"role": "user", "content": "What is 1 + 2 + 3?"}]
ROW = {"prompt": ASK, "completions": ["1 + 2 = 3", "3 + 3 = 7"], "labels": [True, False]}
REAL = {"qwen2.5": "tokenizers/Qwen2.5-0.5B-Instruct",
        "smollm2": "tokenizers/SmolLM2-135M-Instruct", "sentencepiece": "models/stories260K"}


@pytest.fixture
def tokenizer():
    """Of tiny/chat: eos is the end of turn, pad is another token."""
    return common.load_tokenizer(str(ROOT / "tiny/chat"))


def real_tokenizer(name):
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with real tokenizers")
    return AutoTokenizer.from_pretrained(SHARED / REAL[name])


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- where a step ends ---------------------------------------------------------------------------

PARTS = ["words", "2 + 2", " ", "\n", "\n\n", "\t", "\xe9\u4f60\u597d", "\U0001f642", "\u2028",
         "\\n", '"', "{{ x }}", "{% if %}", " .", "Assistant:", "\U0001f469\u200d\U0001f467", "1",
         "'s"]
STEPS = st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("".join),
                 min_size=1, max_size=5).filter(lambda steps: all(step.strip() for step in steps))


def last_tokens(tokenizer, text, steps):
    """The ids of a text, and for each step at its end the last token of its last character.

    From the offsets that the tokenizer notes while it reads, not from decoding.
    """
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start = text.rindex("\n".join(steps))
    ends = []
    for step in steps:
        start += len(step)
        ends.append(max(i for i, (a, b) in enumerate(read["offset_mapping"]) if a < start <= b))
        start += 1
    return read["input_ids"], ends


def check_chats(tokenizer):
    """A step is read at its last token, in the very ids of the conversation."""
    @QUICK
    @given(STEPS)
    def check(steps):
        row = {"prompt": ASK, "completions": steps, "labels": [True] * len(steps)}
        solution = PROCESS(row, tokenizer, 10**6)["solution"]
        steps = [step.strip() for step in steps]
        answer = {"role": "assistant", "content": "\n".join(steps)}
        ids, ends = last_tokens(tokenizer, common.render(tokenizer, [*ASK, answer]), steps)
        assert solution["input_ids"] == ids[:len(solution["input_ids"])]
        assert solution["step_ends"] == ends

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_read_at_its_last_token_in_every_template(name):
    """Also where steps hold newlines, repeat or contain each other, or where tokens cut letters."""
    check_chats(tokenizer_of(name))


@pytest.mark.parametrize("name", ["qwen2.5", "smollm2"])
def test_a_step_is_read_at_its_last_token_by_real_tokenizers(name):
    """With their own templates, and tokens such as ".\\n" that hold more than the step's end."""
    tokenizer = real_tokenizer(name)
    check_chats(tokenizer)
    solution = PROCESS(ROW | {"completions": ["It is so.", "Yes."]}, tokenizer, 512)["solution"]
    token = tokenizer.decode(solution["input_ids"][solution["step_ends"][0]])
    assert token == (".\n" if name == "qwen2.5" else ".")


@pytest.mark.parametrize("name", REAL)
def test_a_step_is_read_at_its_last_token_in_plain_text(name):
    """Without a template, on the line below the prompt; a prompt of one word and one of many."""
    tokenizer = real_tokenizer(name)
    tokenizer.chat_template = None

    @QUICK
    @given(STEPS, st.sampled_from(["Why?", "What is\n1 + 1?\n", "\u4f60\u597d"]))
    def check(steps, prompt):
        row = {"prompt": prompt, "completions": steps, "labels": [True] * len(steps)}
        example = PROCESS(row, tokenizer, 10**6)
        ids, ends = example["solution"]["input_ids"], example["solution"]["step_ends"]
        before = prompt + "\n"
        for step, end in zip(steps, ends, strict=True):
            said, shorter = (tokenizer.decode(ids[:n], skip_special_tokens=True)
                             for n in (end + 1, end))
            before += step.strip()
            assert said.startswith(before) and not shorter.startswith(before)
            before += "\n"
        assert ids[-1] == tokenizer.eos_token_id
        assert ids[:len(example["prompt"])] == example["prompt"]

    check()


def check_sampled(tokenizer, ids):
    """The first prefix that says a line in full, searched from the start."""
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode(ids, **plain)
    steps = [line.strip() for line in text.split("\n") if line.strip()]
    ends = prm.step_ends(tokenizer, ids, steps)
    prefixes = [tokenizer.decode(ids[:n + 1], **plain) for n in range(len(ids))]
    done = 0
    for step, end in zip(steps, ends, strict=True):
        done = text.index(step, done) + len(step)
        assert end == next(n for n, said in enumerate(prefixes) if said[:done] == text[:done])


@pytest.mark.parametrize("name", ["tiny", *REAL])
def test_lines_that_were_sampled_end_where_the_first_prefix_says_them(name, tokenizer):
    """Any ids: letters cut in half or never finished, special tokens, empty lines, no line."""
    tokenizer = tokenizer if name == "tiny" else real_tokenizer(name)
    draw = random.Random(0)
    newline = tokenizer("a\nb", add_special_tokens=False)["input_ids"][-2]
    letters = tokenizer("\U0001f642 \u4f60\u597d", add_special_tokens=False)["input_ids"]
    for _ in range(60):
        ids = []
        for _ in range(draw.randrange(1, 12)):
            several = [[draw.randrange(len(tokenizer))], [newline], letters, letters[:-1]]
            ids += draw.choice(several + [[tokenizer.eos_token_id]])
        check_sampled(tokenizer, ids)


def test_steps_that_repeat_or_contain_each_other_are_told_apart(tokenizer):
    """Each is found behind the one before it."""
    steps = ["2", "2", "2 + 2 = 4", "4", "2"]
    ids = tokenizer("\n".join(steps))["input_ids"]
    ends = prm.step_ends(tokenizer, ids, steps)
    assert [tokenizer.decode(ids[i]) for i in ends] == ["2", "2", "4", "4", "2"]
    assert [ids[:end + 1].count(ids[1]) for end in ends] == [0, 1, 2, 3, 4]  # newlines so far


def test_what_the_tokens_do_not_spell_is_refused(tokenizer):
    """Other words, another order, or a step that a template has changed."""
    ids = tokenizer("one\ntwo")["input_ids"]
    assert len(prm.step_ends(tokenizer, ids, ["one", "two"])) == 2
    for steps in ["three"], ["two", "one"], ["one", "one"]:
        with pytest.raises(ValueError, match="do not spell the step"):
            prm.step_ends(tokenizer, ids, steps)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content", "message.content | upper")
    with pytest.raises(ValueError, match="does not print the content of message 2 whole"):
        PROCESS(ROW | {"completions": ["one", "two"]}, tokenizer, 512)


# ---- what is read there --------------------------------------------------------------------------

@pytest.mark.parametrize("pad", [0, 7, 40])
def test_padding_changes_no_logit(pad):
    """Of tokens or of steps: it is that of the sequence cut off at the step's end, run alone."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_labels=1, pad_token_id=0,
        initializer_range=0.5)
    model = Qwen2ForSequenceClassification(config).eval()
    examples = []
    for ids, ends in ([3, 9, 12, pad], [1, 3]), ([pad, 3, pad, pad, 8, 1], [0, 2, 3]), ([5], [0]):
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "step_ends": ends})
    with torch.no_grad():
        logits = prm.step_logits(model, prm.collate(examples, pad, "cpu"), model.score)
        assert logits.shape == (3, 3)
        for row, example in zip(logits, examples, strict=True):
            for logit, end in zip(row, example["step_ends"], strict=False):
                ids = torch.tensor([example["input_ids"][:end + 1]])
                hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
                assert torch.allclose(logit, (hidden * model.score.weight[0]).sum(), atol=1e-5)


class Fixed(nn.Module):
    """A model whose hidden states are given."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden, self.score = nn.Parameter(hidden), nn.Linear(hidden.shape[-1], 1, bias=False)
        self.device = hidden.device

    def base_model(self, **inputs):
        return (self.hidden,)


@pytest.mark.parametrize("outcome", [False, True])
def test_only_the_last_tokens_of_trained_steps_get_a_gradient(outcome):
    """All steps, or with --outcome the last of each solution; everywhere else it is exactly 0."""
    torch.manual_seed(0)
    model, ends = Fixed(torch.randn(3, 6, 4)), [[1, 2, 4], [5], [0, 3]]
    examples = []
    for row, places in enumerate(ends):
        ones = [1] * len(places)
        examples.append({"solution": {
            "input_ids": [1] * 6, "attention_mask": [1] * 6, "step_ends": places,
            "labels": [i % 2 for i in range(row, row + len(places))], "step_mask": ones,
            "loss_mask": [0] * (len(places) - 1) + [1] if outcome else ones}})
    losses, _ = prm.solution_losses(model, examples, 0)
    losses.sum().backward()
    truth = torch.zeros(3, 6, 4)
    for row, places in enumerate(ends):
        for step, place in enumerate(places):
            if place == places[-1] or not outcome:
                right = torch.sigmoid(model.hidden[row, place] @ model.score.weight[0])
                truth[row, place] = (right - (row + step) % 2) * model.score.weight[0]
    assert torch.allclose(model.hidden.grad, truth, atol=1e-6)
    assert torch.equal(model.hidden.grad != 0, truth != 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_head_is_not_rounded(dtype):
    """In 16 bits a product of matrices would give nearly equal steps the same logit."""
    model = Fixed(torch.full((2, 1, 64), 1.0) + torch.tensor([0.0, 1e-4])[:, None, None])
    nn.init.constant_(model.score.weight, 1.0)
    batch = {name: torch.zeros(2, 1, dtype=torch.long)
             for name in ("input_ids", "attention_mask", "step_ends")}
    with torch.autocast("cpu", dtype):
        low, high = prm.step_logits(model, batch, model.score)
    assert (high - low).item() == pytest.approx(64e-4, rel=0.01)


# ---- the loss ------------------------------------------------------------------------------------

def test_the_loss_is_the_log_likelihood_of_the_labels():
    """−log σ(r) for a right step, −log(1 − σ(r)) for a wrong one; its gradient is σ(r) − l."""
    logits = numbers(0.3, -2.0, 5.0, 0.0).requires_grad_()
    labels, mask = numbers(1, 0, 0, 1), torch.ones(4)
    losses = prm.step_losses(logits, labels, mask)
    p = 1 / (1 + torch.exp(-logits.detach()))
    truth = -torch.stack([p[0], 1 - p[1], 1 - p[2], p[3]]).log()
    assert torch.allclose(losses, truth, atol=1e-12)
    assert losses[3].item() == pytest.approx(math.log(2))  # at r = 0
    losses.sum().backward()
    assert torch.allclose(logits.grad, p - labels, atol=1e-12)


def test_the_loss_passes_gradcheck():
    """Where the mask is 0 the gradient is 0."""
    labels, mask = torch.tensor([[1, 0, 1], [0, 0, 1]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: prm.step_losses(r, labels, mask), (logits,))
    prm.step_losses(logits, labels, mask).sum().backward()
    assert torch.equal(logits.grad != 0, mask.bool())


def test_the_loss_stays_finite_far_away():
    """Where σ is 0 in every number format, the loss is the distance and its gradient 1."""
    logits = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = prm.step_losses(logits, torch.tensor([0, 1]), torch.ones(2))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([1e4, 1e4]) and logits.grad.tolist() == [1, -1]


# ---- what is counted -----------------------------------------------------------------------------

def batch_of(solutions):
    """Logits and labels of some solutions, padded: a padded logit may be anything."""
    width = max(len(labels) for _, labels in solutions)
    logits, batch = [], {"labels": [], "step_mask": [], "loss_mask": []}
    for row, labels in solutions:
        padding = width - len(labels)
        logits.append([*row] + [-3.0 if len(row) % 2 else 3.0] * padding)
        batch["labels"].append([*labels] + [0] * padding)
        batch["step_mask"].append([1] * len(labels) + [0] * padding)
        batch["loss_mask"].append([1] * len(labels) + [0] * padding)
    batch = {name: torch.tensor(rows) for name, rows in batch.items()}
    logits = torch.tensor(logits)
    return prm.step_losses(logits, batch["labels"], batch["loss_mask"]), logits, batch


def figures_of(*batches):
    sums = {}
    for solutions in batches:
        prm.add_up(sums, prm.count_steps(*batch_of(solutions)))
    return prm.step_figures(prm.over_processes(sums, prm.FIGURES, "cpu"))


def brute_force(solutions):
    """Every figure as its sentence says, one solution after the other."""
    loss, agreed, steps, places = 0.0, 0, 0, []
    verdicts = {"min": 0, "product": 0, "last": 0}
    for row, labels in solutions:
        chances = [1 / (1 + math.exp(-logit)) for logit in row]
        for p, label in zip(chances, labels, strict=True):
            loss -= math.log(p if label else 1 - p)
            agreed += (p >= 0.5) == bool(label)
            steps += 1
        said = [i for i, p in enumerate(chances) if p < 0.5]
        true = [i for i, label in enumerate(labels) if not label]
        places.append((said[0] if said else None, true[0] if true else None))
        verdicts["min"] += (min(chances) >= 0.5) == all(labels)
        verdicts["product"] += (math.prod(chances) >= 0.5) == all(labels)
        verdicts["last"] += (chances[-1] >= 0.5) == all(labels)
    hits = sum(said is not None and said == true for said, true in places)
    flagged = sum(said is not None for said, _ in places)
    wrong = sum(true is not None for _, true in places)
    precision, recall = hits / flagged if flagged else 0, hits / wrong if wrong else 0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0
    return {"loss": loss / steps, "step_accuracy": agreed / steps, "precision": precision,
            "recall": recall, "f1": f1} | {
        f"accuracy_{name}": n / len(solutions) for name, n in verdicts.items()}


def test_figures_are_what_a_search_by_hand_finds():
    """Random verdicts on solutions of one to five steps, in which several steps may be wrong."""
    draw = random.Random(0)
    for size in [1, 2, 3] * 20 + [200]:
        solutions = []
        for _ in range(size):
            labels = [int(draw.random() < 0.7) for _ in range(draw.randint(1, 5))]
            solutions.append(([draw.gauss(2 * label - 0.6, 1) for label in labels], labels))
        truth = brute_force(solutions)
        assert figures_of(solutions) == pytest.approx(truth, rel=1e-5)
        parts = [solutions[i:i + 3] for i in range(0, size, 3)]
        assert figures_of(*parts) == pytest.approx(truth, rel=1e-5)  # of whatever micro-batches
    assert 0.1 < truth["f1"] < 0.9 and truth["precision"] != truth["recall"]


def test_a_hit_is_the_first_wrong_step_and_no_other():
    """Of five solutions: hit, too early, too late, missed, and a right one that is suspected."""
    good, bad = 2.0, -2.0
    hit = ([good, bad, bad], [1, 0, 0])
    early, late = ([bad, bad], [1, 0]), ([good, bad], [0, 0])
    missed, suspected = ([good, good], [1, 0]), ([good, bad], [1, 1])
    figures = figures_of([hit, early, late, missed, suspected])
    assert figures["precision"] == 1 / 4 and figures["recall"] == 1 / 4 and figures["f1"] == 1 / 4
    figures = figures_of([hit, missed])
    assert (figures["precision"], figures["recall"]) == (1, 1 / 2)
    assert figures["f1"] == pytest.approx(2 / 3)
    figures = figures_of([hit, suspected])
    assert (figures["precision"], figures["recall"]) == (1 / 2, 1)
    right = ([good, good], [1, 1])
    assert figures_of([right]) == pytest.approx(brute_force([right]))  # and none is divided by 0


def test_many_small_doubts_make_a_solution_wrong_by_the_product_alone():
    """0.9 to the power of 7 is 0.478; padding adds no factor, and a lone step is what it is."""
    doubt = math.log(9)  # σ is 0.9
    short, long = ([doubt] * 6, [1] * 6), ([doubt] * 7, [1] * 7)
    alone = figures_of([short]), figures_of([long])
    assert [x["accuracy_product"] for x in alone] == [1, 0]
    assert [x["accuracy_min"] for x in alone] == [1, 1]
    assert figures_of([short, long, ([-doubt], [0])])["accuracy_product"] == 2 / 3


def test_a_chance_of_a_half_is_right():
    """At r = 0: σ(r) < 0.5 makes a step wrong, and 0.5 is not less."""
    figures = figures_of([([0.0], [1]), ([-1e-6], [0])])
    assert set(figures[name] for name in figures if "accuracy" in name) == {1}


@pytest.mark.parametrize("outcome", [False, True])
def test_held_out_figures_are_those_of_all_steps(outcome, tokenizer):
    """With --outcome, too: only its loss is that of the last steps."""
    encode = functools.partial(prm.encode_solution, outcome=outcome)
    rows = [ROW, ROW | {"completions": ["1 + 2 = 4"], "labels": [False]},
            ROW | {"completions": ["1 + 2 = 3", "3 + 3 = 5", "5 + 1 = 6"], "labels": [True] * 3}]
    examples = [encode(row, tokenizer, 512) for row in rows]
    longest = max(len(x["solution"]["input_ids"]) for x in examples)
    torch.manual_seed(0)
    model = Fixed(torch.randn(3, longest, 8))
    losses, counts = prm.solution_losses(model, examples, tokenizer.pad_token_id)
    loss, counts = losses.sum(), {name: x.sum().item() for name, x in counts.items()}
    solutions, last = [], 0.0
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        at_ends = model.hidden[i, example["solution"]["step_ends"]]
        logits = (at_ends @ model.score.weight[0]).tolist()
        solutions.append((logits, row["labels"]))
        last -= math.log(1 / (1 + math.exp(-logits[-1] * (1 if row["labels"][-1] else -1)))) / 3
    truth = brute_force(solutions) | ({"loss": last} if outcome else {})
    assert prm.step_figures(counts) == pytest.approx(truth, rel=1e-5)
    assert loss.item() == pytest.approx(truth["loss"] * (3 if outcome else 6), rel=1e-5)


# ---- rows ----------------------------------------------------------------------------------------

def test_an_example_is_prompt_answer_ends_labels_and_masks(tokenizer):
    """The answer as sampled, with its end of turn; --outcome differs in the loss mask alone."""
    example = PROCESS(ROW, tokenizer, 512)
    solution = example["solution"]
    ids = solution["input_ids"]
    assert ids[:len(example["prompt"])] == example["prompt"]
    said = tokenizer.decode(ids[len(example["prompt"]):])
    assert said == "1 + 2 = 3\n3 + 3 = 7<|im_end|>"
    assert [tokenizer.decode(ids[:end + 1])[-3:] for end in solution["step_ends"]] == ["= 3", "= 7"]
    assert solution["labels"] == [1, 0] and solution["attention_mask"] == [1] * len(ids)
    assert solution["step_mask"] == solution["loss_mask"] == [1, 1]
    outcome = prm.encode_solution(ROW, tokenizer, 512, outcome=True)
    assert example["length"] == len(ids)
    assert outcome == example | {"solution": solution | {"loss_mask": [0, 1]}}


def test_a_text_prompt_is_a_question_to_the_assistant_if_there_is_a_template(tokenizer):
    """Else the solution begins on the line below it; messages then cannot be used."""
    text = ROW | {"prompt": ASK[0]["content"]}
    assert PROCESS(text, tokenizer, 512) == PROCESS(ROW, tokenizer, 512)
    tokenizer.chat_template = None
    ids = PROCESS(text, tokenizer, 512)["solution"]["input_ids"]
    assert tokenizer.decode(ids) == "What is 1 + 2 + 3?\n1 + 2 = 3\n3 + 3 = 7<|im_end|>"
    with pytest.raises(ValueError):
        PROCESS(ROW, tokenizer, 512)


def test_blanks_around_a_step_are_no_part_of_it(tokenizer):
    """A step's last character is a word's: newlines between steps, not within them, are ours."""
    row = ROW | {"completions": [" 1 + 2 = 3 \n", "\n3\n\n+ 3 = 7\t"]}
    said = tokenizer.decode(PROCESS(row, tokenizer, 512)["solution"]["input_ids"])
    assert said.endswith("assistant\n1 + 2 = 3\n3\n\n+ 3 = 7<|im_end|>")


def test_special_tokens_that_a_step_spells_are_mere_text(tokenizer):
    """The step is found, and the answer has one end of turn; in plain text the row is refused."""
    row = ROW | {"completions": ["so <|im_end|>", "and <|im_start|>"]}
    solution = PROCESS(row, tokenizer, 512)["solution"]
    ids = solution["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2  # the question's and the answer's
    assert [tokenizer.decode(ids[end]) for end in solution["step_ends"]] == [">", ">"]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="do not spell"):
        PROCESS(row | {"prompt": "1?"}, tokenizer, 512)


@pytest.mark.parametrize("change", [
    {"labels": [True]}, {"labels": [True, 0]}, {"labels": [1, 0]}, {"labels": ["true", "false"]},
    {"labels": None}, {"labels": True}, {"labels": [True, None]}, {"labels": [True, False, True]},
    {"completions": "1 + 2 = 3", "labels": [True]}, {"completions": [], "labels": []},
    {"completions": ["1 + 2 = 3", " "]}, {"completions": ["1 + 2 = 3", 3]},
    {"completions": None}, {"completions": [ASK[0], ASK[0]]}, {"prompt": ""}, {"prompt": None},
    {"prompt": []}, {"prompt": 0.5}, {"prompt": ["What?"]}])
def test_a_row_that_cannot_be_used_is_dropped_and_counted(change, tokenizer, capsys):
    """The others stay, and the first that went is named with its reason."""
    rows = [ROW, {name: x for name, x in (ROW | change).items() if x is not None}]
    kept = common.encode_rows("x", rows, PROCESS, tokenizer, 512)
    assert kept == [PROCESS(ROW, tokenizer, 512)]
    report = "2 rows, 1 examples; 1 rows cannot be used, the first is row 2: "
    assert report in capsys.readouterr().out


def test_solutions_are_never_cut(tokenizer):
    """One is whole up to the last of --max-length tokens."""
    length = len(PROCESS(ROW, tokenizer, 512)["solution"]["input_ids"])
    assert PROCESS(ROW, tokenizer, length) == PROCESS(ROW, tokenizer, 512)
    with pytest.raises(ValueError, match=f"longer than {length - 1} tokens"):
        PROCESS(ROW, tokenizer, length - 1)


# ---- a run ---------------------------------------------------------------------------------------

def short_run(tmp_path, write_jsonl, **flags):
    text = (ROOT / "tiny/data/steps_train.jsonl").read_text().splitlines()[:11]
    rows = list(map(json.loads, text))
    held_out = write_jsonl(rows[8:], "held_out.jsonl")
    args = run_args(prm, dataset=write_jsonl(rows[:8]), eval_dataset=held_out, batch_size=4,
                    max_steps=2, output_dir=tmp_path / "run", **flags)
    return args, rows


def test_outcome_is_a_flag_of_the_command_line(tmp_path, write_jsonl, monkeypatch):
    """It reaches the rows, and the folder remembers it."""
    args, _ = short_run(tmp_path, write_jsonl)
    assert args.outcome is False
    assert run_args(prm, outcome=[]).outcome is True
    args.outcome, masks = True, []
    score = prm.solution_losses

    def seen(model, examples, pad_id):
        masks.extend(example["solution"]["loss_mask"] for example in examples)
        return score(model, examples, pad_id)

    monkeypatch.setattr(prm, "solution_losses", seen)
    prm.train(args)
    assert masks and all(mask == [0] * (len(mask) - 1) + [1] for mask in masks)
    assert json.loads((tmp_path / "run/summary.json").read_text())["outcome"] is True


def test_a_run_shows_where_steps_are_read_and_what_they_get(tmp_path, write_jsonl, capsys):
    """In green before training; after it, each step of some held-out solutions with its chance."""
    args, rows = short_run(tmp_path, write_jsonl)
    prm.train(args)
    said = capsys.readouterr().out
    shown = said[said.index("<|im_start|>"):]
    assert shown.count("\033[32m") == len(rows[0]["completions"])
    for step in rows[0]["completions"]:
        assert f"{step[:-1]}\033[32m{step[-1]}\033[0m" in shown
    lines = said[said.index("held out"):].splitlines()
    model = common.load_model(str(tmp_path / "run"), trainable=False, task="SEQ_CLS")
    tokenizer = common.load_tokenizer(str(tmp_path / "run"))
    for row in rows[8:]:
        solution = PROCESS(row, tokenizer, 512)["solution"]
        for step, label, end in zip(row["completions"], row["labels"], solution["step_ends"],
                                    strict=True):
            with torch.no_grad():  # transformers reads the last token
                ids = torch.tensor([solution["input_ids"][:end + 1]])
                p = model(input_ids=ids).logits[0, 0].sigmoid().item()
            assert f"{p:5.2f}  {'correct' if label else 'wrong  '}  {step}" in lines
    steps = list(itertools.chain(*(row["completions"] for row in rows[8:])))
    assert sum(line.endswith(tuple(steps)) for line in lines) == len(steps)
