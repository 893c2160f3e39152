"""`sample` draws from exactly the distribution that `token_logps` scores (both in grpo.py)."""
import math
from argparse import Namespace
from collections import Counter

import by_hand
import pytest
import tokenizers
import torch
import transformers
from conftest import drawn_logps

import common
import grpo

PROMPTS = [[1, 2, 3], [4, 0, 5], [6, 1, 1, 0, 7, 3, 5], [3]]  # 0 is the pad token as well
WINDOW = 4
SIZES = dict(vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
             initializer_range=0.4, bos_token_id=None, eos_token_id=None, pad_token_id=None)
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**SIZES),
    "gemma3": transformers.Gemma3TextConfig(
        sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"], **SIZES),
    "gpt2": transformers.GPT2Config(
        vocab_size=12, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4,
        bos_token_id=None, eos_token_id=None)}


def make_tokenizer(eos=11, end_of_turn=None):
    """One token per number below 12. With `end_of_turn`, the chat template ends turns with it."""
    model = tokenizers.models.WordLevel({str(i): i for i in range(12)}, unk_token="0")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), eos_token=str(eos), pad_token="0")
    if end_of_turn is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": [str(end_of_turn)]})
        tokenizer.chat_template = (
            "{% for message in messages %}{{ message.content }}" f"{end_of_turn}" "{% endfor %}")
    return tokenizer


def make_model(shape="qwen2", seed=0, **changes):
    """A random model in evaluation mode, with clearly unequal next-token probabilities."""
    torch.manual_seed(seed)
    config = type(CONFIGS[shape])(**CONFIGS[shape].to_dict() | changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def sample(model, prompts=PROMPTS, copies=1, longest=6, temperature=1.0, seed=0, tokenizer=None):
    args = Namespace(max_new_tokens=longest, temperature=temperature)
    return grpo.sample(model, tokenizer or make_tokenizer(), prompts, copies, args, seed)


@torch.no_grad()
def next_logps(model, rows, temperature=1.0):
    """log softmax(logits / T) after rows of equal length, without cache, mask or padding."""
    return (model(torch.tensor(rows)).logits[:, -1].double() / temperature).log_softmax(-1)


# ---- the distribution ----------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_samples_follow_the_distribution_that_is_scored(temperature):
    """All answers of up to three tokens occur as often as their probabilities say (chi-squared)."""
    model, count, tokenizer = make_model(vocab_size=6), 10000, make_tokenizer(eos=5)
    model.generation_config.eos_token_id = [4]
    prompts = [[1, 2, 3, 0, 2], [3, 1]]  # of different lengths, so that one is padded
    drawn = sample(model, prompts, count, 3, temperature, tokenizer=tokenizer)
    for number, prompt in enumerate(prompts):
        logps = {(): 0.0}
        for _ in range(3):
            going = [answer for answer in logps if not {4, 5} & {*answer}]
            nexts = next_logps(model, [prompt + list(answer) for answer in going], temperature)
            for answer, row in zip(going, nexts.tolist(), strict=True):
                before = logps.pop(answer)
                logps |= {answer + (token,): before + logp for token, logp in enumerate(row)}
        expected = {answer: count * math.exp(logp) for answer, logp in logps.items()}
        seen = Counter(map(tuple, drawn[number * count:(number + 1) * count]))
        assert seen.keys() <= expected.keys(), "impossible answers"
        cells = [(seen[answer], mean) for answer, mean in expected.items() if mean >= 5]
        cells.append((count - sum(x for x, _ in cells), count - sum(x for _, x in cells)))
        chi2 = sum((x - mean) ** 2 / mean for x, mean in cells)
        degrees = len(cells) - 1
        assert degrees > 20 and chi2 < degrees + 4 * math.sqrt(2 * degrees), (
            f"chi-squared {chi2:.0f} at {degrees}: wrong temperature, or rows mixed up?")


def with_adapter(name):
    """A model as training loads it, except that its B matrices are random instead of 0."""
    torch.manual_seed(0)
    model = common.load_model(str(name), lora_rank=4)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("temperature", [0.8, 1.5])
@pytest.mark.parametrize("shape", CONFIGS)
def test_what_is_scored_is_what_was_sampled(shape, temperature, draws, tmp_path):
    """The sampler's log-prob of each token equals its score, and that of a plain forward pass.

    Prompts differ in length, answers leave the batch, and some exceed the sliding window.
    """
    make_model(shape).save_pretrained(tmp_path)
    model, tokenizer = with_adapter(tmp_path), make_tokenizer()
    answers = sample(model, PROMPTS, 4, 9, temperature)
    assert len({len(answer) for answer in answers}) > 2 and max(map(len, answers)) == 9 > WINDOW
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    batch = grpo.join_answers(prompts, answers, tokenizer, model)
    model.eval()
    with torch.no_grad():
        scored = grpo.token_logps(model, batch, temperature)
        sampled = drawn_logps(draws, answers)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ours = scored[row, len(prompt) - 1:len(prompt) - 1 + len(answer)].double()
            plain = by_hand.logps(model, prompt, answer, temperature).double()
            by_hand.same(ours, sampled[row], f"{shape}, answer {row}: score, sample", 2e-5)
            by_hand.same(plain, sampled[row], f"{shape}, answer {row}: plain, sample", 2e-5)
        assert torch.equal(scored != 0, batch["loss_mask"][:, 1:].bool()), "outside the answers"
        with common.reference(model):  # the adapter has an effect
            assert (grpo.token_logps(model, batch, temperature) - scored).abs().max() > 0.1


def test_the_seed_changes_the_samples_and_the_models_own_generation_config_does_not():
    """The sampler ignores the model's own top-k, top-p, temperature, penalties and lengths."""
    model = make_model()
    free = sample(model, copies=4)
    assert sample(model, copies=4, seed=1) != free, "the seed has no effect"
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, min_p=0.5, temperature=0.1, repetition_penalty=3.0,
        no_repeat_ngram_size=1, max_new_tokens=1, min_new_tokens=9, suppress_tokens=[1, 2, 3])
    assert sample(model, copies=4) == free


def test_probabilities_are_computed_in_32_bits(monkeypatch):
    """16-bit logits are divided by the temperature and normalized in fp32."""
    model, tables = make_model().to(torch.bfloat16), []
    read, multinomial = common.read, torch.multinomial

    def keep(*args, **kwargs):
        tables.append(read(*args, **kwargs))
        return tables[-1]

    def check(probs, number, generator):
        logits = tables[-1][0].repeat_interleave(len(probs) // len(tables[-1][0]), 0).double()
        exact = (logits / 0.7).softmax(-1)
        by_hand.same(probs.double(), exact, "probabilities: rounded to 16 bits?", 1e-6)
        return multinomial(probs, number, generator=generator)
    monkeypatch.setattr(common, "read", keep)
    monkeypatch.setattr(torch, "multinomial", check)
    sample(model, copies=2, temperature=0.7)


# ---- how answers end -----------------------------------------------------------------------------

def test_each_stop_token_ends_an_answer_and_belongs_to_it():
    """Stop tokens are EOS, the template's end of turn, and those of the generation config."""
    model, tokenizer = make_model(), make_tokenizer(eos=11, end_of_turn=10)
    model.generation_config.eos_token_id = [8, 9]
    answers = sample(model, copies=64, longest=5, tokenizer=tokenizer)
    stops = {8, 9, 10, 11}
    for answer in answers:
        assert 1 <= len(answer) <= 5 and not stops & set(answer[:-1])
        assert answer[-1] in stops or len(answer) == 5
    assert {answer[-1] for answer in answers if len(answer) < 5} == stops


def test_an_answer_of_the_longest_length_that_ends_in_a_stop_token_counts_as_stopped():
    """Its last token decides, not its length. The mask covers that token, but no padding."""
    model, tokenizer = make_model(), make_tokenizer(eos=11, end_of_turn=10)
    model.generation_config.eos_token_id = 9
    for last, stopped in (11, True), (10, True), (9, True), (5, False):
        batch = grpo.join_answers([[1, 2], [0, 3, 4]], [[5, 6, last], [11]], tokenizer, model)
        assert batch["stopped"].tolist() == [stopped, True], f"an answer that ends in {last}"
        assert batch["input_ids"].tolist() == [[1, 2, 5, 6, last], [0, 3, 4, 11, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
        assert batch["loss_mask"].tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 1, 0]]


def test_prompts_are_read_once_and_answers_that_ended_leave_the_batch():
    """After the prompts, a pass reads one token of each unfinished answer. No pass is wasted."""
    model, shapes = make_model(), []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True)
    lengths = [len(answer) for answer in sample(model, PROMPTS, 4, 9)]
    hook.remove()
    going = [sum(length > t for length in lengths) for t in range(1, 9)]
    assert len(set(going)) > 2 and shapes == [(4, 7)] + [(number, 1) for number in going if number]
