"""SFT: what is trained, the loss, its gradient in 16 bits, and the sampled answers.

The loop as a whole is proven in test_sft_reward_loop.py.
"""
import functools
import json
import math

import pytest
import torch
from conftest import ROOT, metrics_of, run_args
from torch import nn
from transformers import PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM

import common
import sft

QUESTION = {"role": "user", "content": "What is 1 + 1?"}
CHAT = [QUESTION, {"role": "assistant", "content": "1 + 1 = 2"}]
LONG = [{"role": "system", "content": "Be brief."}, *CHAT,
        {"role": "user", "content": "And 2 + 2?"}, {"role": "assistant", "content": "4"}]
# writes the thoughts of the last turn only, as Qwen3's template does
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# writes tools in front, and a tool call as JSON, as many templates do
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CALL = {"name": "add", "arguments": {"a": 1, "b": 1}}


@pytest.fixture
def tokenizer():
    """Of tiny/chat: eos is the end of turn, pad is another token."""
    return common.load_tokenizer(str(ROOT / "tiny/chat"))


def small_model(tied=False, train_head=False):
    """Large weights, so that a leak of attention would show."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
        initializer_range=0.5)
    model = Qwen2ForCausalLM(config)
    model.get_output_embeddings().weight.requires_grad_(train_head)
    return model


def examples(lengths=(9, 4, 7, 5), prompt=2):
    torch.manual_seed(1)
    made = []
    for n in lengths:
        made.append({"input_ids": torch.randint(0, 41, (n,)).tolist(),
                     "loss_mask": [0] * prompt + [1] * (n - prompt), "attention_mask": [1] * n})
    return made


class Fixed(nn.Module):
    """A model whose hidden states are given, so that each log-prob can be chosen."""

    def __init__(self, hidden, head):
        super().__init__()
        self.hidden, self.head = nn.Parameter(hidden), head
        self.config = PreTrainedConfig()

    def base_model(self, **inputs):
        return (self.hidden,)

    def get_output_embeddings(self):
        return self.head


class Wide(nn.Module):
    """A head that claims a vocabulary of which only `chunk` positions fit into memory at once."""

    def __init__(self, head, chunk):
        super().__init__()
        self.head, self.sizes = head, []
        self.register_buffer("weight", torch.empty(2**24 // chunk, 0))

    def forward(self, hidden):
        self.sizes.append(len(hidden))
        return self.head(hidden)


# ---- the loss ------------------------------------------------------------------------------------

def test_the_mean_is_over_tokens_not_over_conversations():
    """Four tokens at −1, −1, −1 and −5: by conversations it would be 3."""
    logps = torch.tensor([[-1.0, -1.0, -1.0], [-5.0, 0.0, 0.0]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]])
    assert sft.sft_loss(logps, mask, 4).item() == pytest.approx(2.0)
    parts = [sft.sft_loss(logps[i:i + 1], mask[i:i + 1], 4).item() for i in range(2)]
    assert parts == [0.75, 1.25]  # the micro-batches of a step add up


def test_the_loss_passes_gradcheck():
    """And a log-prob has the gradient −1/N where the mask is 1, exactly 0 elsewhere."""
    logps = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1]])  # the first token is never predicted
    assert torch.autograd.gradcheck(lambda x: sft.sft_loss(x, mask, 4), (logps,))
    sft.sft_loss(logps, mask, 4).backward()
    quarter = torch.tensor([[0, -0.25, -0.25], [-0.25, 0, -0.25]], dtype=torch.float64)
    assert torch.equal(logps.grad, quarter)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_log_probs_and_gradients_equal_those_of_all_logits(tied, train_head, chunk):
    """For frozen, trained and tied heads, any chunk and a temperature; 0 where the mask is."""
    model, rows = small_model(tied, train_head), examples()
    head = model.get_output_embeddings()
    wide = Wide(head, chunk)
    weights = [p for p in model.parameters() if p.requires_grad]
    assert any(p is head.weight for p in weights) == train_head
    model.get_output_embeddings = lambda: wide
    batch = sft.collate(rows, 0, "cpu")
    ours = sft.token_logps(model, batch, 1.5)  # [B, T-1]
    factors = torch.randn(ours.shape)
    our_gradients = torch.autograd.grad((ours * factors).sum(), weights)
    trained = sum(sum(row["loss_mask"]) for row in rows)
    assert max(wide.sizes) == min(chunk, trained) and sum(wide.sizes) == 2 * trained

    total = 0.0
    for row, logps, factor in zip(rows, ours, factors, strict=True):  # one by one, unpadded
        ids = torch.tensor(row["input_ids"])
        all_logps = (model(ids[None]).logits[0].float() / 1.5).log_softmax(-1)  # [T, V]
        for t in range(len(logps)):
            if t + 1 < len(ids) and row["loss_mask"][t + 1]:
                truth = all_logps[t, ids[t + 1]]
                assert logps[t].item() == pytest.approx(truth.item(), rel=1e-4, abs=1e-5)
                total += factor[t] * truth
            else:
                assert logps[t] == 0
    for a, b in zip(our_gradients, torch.autograd.grad(total, weights), strict=True):
        assert b.abs().max() > 1e-3 and (a - b).norm() < 1e-4 * b.norm()


def test_transformers_gives_the_same_loss_for_the_same_labels():
    """Its labels are −100 where nothing is trained; the shift is its own."""
    model, rows = small_model(), examples()
    batch = sft.collate(rows, 0, "cpu")
    labels = batch["input_ids"].masked_fill(batch["loss_mask"] == 0, -100)
    theirs = model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    trained = sum(sum(row["loss_mask"]) for row in rows)
    ours = sft.sft_loss(sft.token_logps(model, batch), batch["loss_mask"], trained)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_gradient_is_zero_where_the_mask_is_and_reaches_the_end_of_each_turn():
    """Also where the end of turn, eos and the pad token are one and the same."""
    tokenizer = common.load_tokenizer(str(ROOT / "tiny/base"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoded = [sft.encode_conversation({"messages": chat}, tokenizer, 512) for chat in (LONG, CHAT)]
    batch = sft.collate([x["tokens"] for x, in encoded], tokenizer.pad_token_id, "cpu")
    ids, shape = batch["input_ids"], batch["input_ids"].shape
    torch.manual_seed(0)
    model = Fixed(torch.randn(*shape, 8), nn.Linear(8, 400, bias=False))
    sft.sft_loss(sft.token_logps(model, batch), batch["loss_mask"], 7).backward()
    gradient = model.hidden.grad.norm(dim=-1)[:, :-1]  # [B, T-1]: position t predicts token t+1
    assert torch.equal(gradient != 0, batch["loss_mask"][:, 1:] == 1)
    ends = [(row == tokenizer.eos_token_id).nonzero().flatten().tolist() for row in ids]
    last = batch["attention_mask"].sum(-1) - 1
    assert sum(end <= last[0] for end in ends[0]) == 2
    assert ends[1][0] == last[1] < shape[1] - 1  # then comes the padding
    for row, end in (0, ends[0][0]), (0, ends[0][1]), (1, ends[1][0]):
        assert gradient[row, end - 1] > 0.01

    changed = batch | {"input_ids": torch.where(batch["loss_mask"] == 1, ids, ids + 1)}
    assert torch.equal(sft.token_logps(model, batch), sft.token_logps(model, changed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_confident_tokens_keep_their_gradient_in_16_bits(dtype, temperature):
    """From p = 0.9 to 0.99999: within 1% of softmax − one-hot in fp32, per token and in sum.

    A logit divided by a temperature is no 16-bit number any more: rounded, it is off by 3%.
    """
    chosen = torch.tensor([3.25, 5.5, 7.75, 10.25, 12.75])  # exact in 16 bits
    hidden = torch.zeros(1, 6, 4)
    hidden[0, :5, 0] = chosen
    model = Fixed(hidden, nn.Linear(4, 4, bias=False))
    model.head.weight.data = torch.eye(4)  # so that the logits are the hidden states
    batch = {"input_ids": torch.zeros(1, 6, dtype=torch.long), "attention_mask": torch.ones(1, 6),
             "loss_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logps = sft.token_logps(model, batch, temperature)
    scale = 1024.0  # as a GradScaler would
    (scale * sft.sft_loss(logps, batch["loss_mask"], 5)).backward()
    probabilities = (hidden[0, :5] / temperature).softmax(-1)  # [5, 4]
    if temperature == 1:
        assert 0.89 < probabilities[0, 0] < 0.9 and probabilities[4, 0] > 0.99999
    truth = (probabilities - torch.tensor([1.0, 0.0, 0.0, 0.0])) / 5 / temperature
    ours = model.hidden.grad[0, :5] / scale
    assert logps.dtype == torch.float32
    for a, b in zip(ours, truth, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()
    assert (ours.sum(0) - truth.sum(0)).norm() < 0.01 * truth.sum(0).norm()
    for_head = model.head.weight.grad[:, 0] / scale  # the sum over positions
    assert (for_head - truth.T @ chosen).norm() < 0.01 * (truth.T @ chosen).norm()


# ---- NEFTune -------------------------------------------------------------------------------------

def test_neftune_noise_is_uniform_within_its_bound_and_off_in_evaluation():
    """±α/√(L·D), where L counts the real tokens of a row: by mask, as pad may be eos."""
    model, rows = small_model(), examples(lengths=(60, 20, 40))
    rows[1]["input_ids"] = [0] * 20  # all are what the padding is
    batch = sft.collate(rows, 0, "cpu")
    plain = model.get_input_embeddings()(batch["input_ids"])
    seen = []
    hook = functools.partial(sft.add_noise, 5.0)
    model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    layer = model.base_model.layers[0]
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0] - plain))
    for training in False, True, True:
        sft.token_logps(model.train(training), batch)
    silent, noise, other = seen
    assert not silent.any() and not torch.equal(noise, other)
    for row, length in zip(noise, (60, 20, 40), strict=True):
        share = row[:length] * math.sqrt(length * 16) / 5  # uniform from −1 to 1
        assert 0.98 < share.abs().max() < 1.0001
        assert share.abs().mean().item() == pytest.approx(0.5, abs=0.06)
        assert share.mean().item() == pytest.approx(0, abs=0.08)
        assert len(share.unique()) > 0.9 * share.numel()  # each number has its own


def test_a_run_with_neftune_trains_otherwise_and_is_evaluated_without(tmp_path, write_jsonl):
    """Evaluations do not change its noise; the prompts of equal length are sampled unpadded."""
    rows = [{"messages": [QUESTION | {"content": str(i)}, CHAT[1]]} for i in range(10)]
    file, lines, before = write_jsonl(rows), {}, {}
    for alpha, every in (0, 0), (5, 0), (5, 1):
        folder = tmp_path / f"{alpha}{every}"
        sft.train(run_args(sft, dataset=file, max_steps=2, batch_size=2, eval_size=2,
                           max_new_tokens=1, neftune_alpha=alpha, eval_every=every,
                           output_dir=folder))
        lines[alpha, every] = [(m["loss"], m["grad_norm"]) for m in metrics_of(folder)]
        before[alpha, every] = json.loads((folder / "summary.json").read_text())["before"]
    assert lines[5, 0] == lines[5, 1] and lines[5, 0][0] != lines[0, 0][0]
    assert before[5, 0] == before[5, 1] == before[0, 0]


# ---- data ----------------------------------------------------------------------------------------

def trained_text(tokenizer, example):
    pairs = zip(example["input_ids"], example["loss_mask"], strict=True)
    return tokenizer.decode([token for token, trained in pairs if trained])


@pytest.mark.parametrize("row, shown, trained", [
    ({"messages": CHAT}, "assistant\n", "1 + 1 = 2<|im_end|>"),
    ({"messages": LONG}, "assistant\n", "1 + 1 = 2<|im_end|>4<|im_end|>"),
    ({"prompt": LONG[:4], "completion": LONG[4:]}, "assistant\n", "4<|im_end|>"),
    ({"prompt": "1 + 1", "completion": " = 2"}, "1 + 1", " = 2<|im_end|>"),
    ({"prompt": "1 + 1", "completion": " = 2<|im_end|>"}, "1 + 1", " = 2<|im_end|>"),
    ({"instruction": "Add.", "input": "1 and 1", "output": "2"},
     "user\nAdd.\n\n1 and 1<|im_end|>\n<|im_start|>assistant\n", "2<|im_end|>"),
    ({"instruction": "Add 1 and 1.", "output": "2"},
     "user\nAdd 1 and 1.<|im_end|>\n<|im_start|>assistant\n", "2<|im_end|>"),
    ({"text": "1 + 1 = 2"}, "1 + ", " + 1 = 2<|im_end|>"),
    ({"text": "1 + 1 = 2<|im_end|>"}, "1 + ", " + 1 = 2<|im_end|>"),
])
def test_only_what_the_model_shall_say_is_trained(tokenizer, row, shown, trained):
    """In every form of row; the prompt of a sample is what comes before, or the text's start."""
    [encoded] = sft.encode_conversation(row, tokenizer, 512)
    example = encoded["tokens"]
    assert trained_text(tokenizer, example) == trained
    assert tokenizer.decode(encoded["prompt"]).endswith(shown)
    assert example["input_ids"][:len(encoded["prompt"])] == encoded["prompt"]
    assert example["attention_mask"] == [1] * len(example["input_ids"])
    if "text" not in row:
        assert tokenizer.decode(example["input_ids"][len(encoded["prompt"]):]).startswith(
            trained.partition("<|im_end|>")[0])


def test_without_a_chat_template_alpaca_rows_are_texts(tokenizer):
    """Its three columns are then divided by empty lines."""
    tokenizer.chat_template = None
    row = {"instruction": "Add.", "input": "1 and 1", "output": "2"}
    [encoded] = sft.encode_conversation(row, tokenizer, 512)
    assert tokenizer.decode(encoded["tokens"]["input_ids"]) == "Add.\n\n1 and 1\n\n2<|im_end|>"
    assert trained_text(tokenizer, encoded["tokens"]) == "2<|im_end|>"


@pytest.mark.parametrize("tools", [[{"name": "add"}], json.dumps([{"name": "add"}])])
def test_tools_are_read_and_tool_calls_are_trained(tokenizer, tools):
    """The usual form has no content; a result of a tool is not what the model says."""
    tokenizer.chat_template = TOOLS
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
    chat = [QUESTION, call, {"role": "tool", "content": "2"}, CHAT[1]]
    [encoded] = sft.encode_conversation({"messages": chat, "tools": tools}, tokenizer, 512)
    said = trained_text(tokenizer, encoded["tokens"])
    assert said == json.dumps(CALL) + "<|im_end|>1 + 1 = 2<|im_end|>"
    assert tokenizer.decode(encoded["prompt"]).startswith('<|im_start|>tools\n[{"name": "add"}]')


def test_a_template_that_rewrites_turns_gives_one_example_per_answer(tokenizer):
    """Each as it is when the model answers: earlier thoughts are gone, its own are trained."""
    tokenizer.chat_template = REWRITING
    thought = {"role": "assistant", "content": "<think>hm</think>2"}
    row = {"messages": [QUESTION, thought, QUESTION, thought]}
    first, second = sft.encode_conversation(row, tokenizer, 512)
    for encoded in first, second:
        assert trained_text(tokenizer, encoded["tokens"]) == "<think>hm</think>2<|im_end|>"
    assert "hm" not in tokenizer.decode(second["prompt"])
    assert len(first["prompt"]) < len(second["prompt"])


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct", "SmolLM2-135M-Instruct"])
def test_real_templates_are_masked(shared, name):
    """They write a system turn of their own, which is read and not trained."""
    tokenizer = common.transformers.AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    [encoded] = sft.encode_conversation({"messages": LONG}, tokenizer, 512)
    assert trained_text(tokenizer, encoded["tokens"]) == "1 + 1 = 2<|im_end|>4<|im_end|>"
    [encoded] = sft.encode_conversation({"messages": CHAT}, tokenizer, 512)
    assert "system" in tokenizer.decode(encoded["prompt"])


@pytest.mark.parametrize("row", [
    {"messages": LONG[:2]}, {"messages": "text"}, {"messages": []}, {"messages": [{"role": "a"}]},
    {"prompt": "a", "completion": CHAT}, {"prompt": "a", "completion": ""}, {"completion": "a"},
    {"text": ["a"]}, {"text": ""}, {"instruction": 3.5, "output": "a"}, {"output": "a"},
    {"instruction": "a", "output": ["a"]}, {"ask": "a", "answer": "b"}, {"messages": 3},
    {"question": "a", "answer": True}, {"question": "a", "answer": 0.5},
])
def test_a_row_that_cannot_be_used_is_dropped_and_counted(row, tokenizer, capsys):
    """The others stay, and the first that went is named with its reason."""
    good = {"messages": CHAT}
    kept = common.encode_rows("x", [good, row, row], sft.encode_conversation, tokenizer, 512)
    assert kept == sft.encode_conversation(good, tokenizer, 512)
    report = "3 rows, 1 examples; 2 rows cannot be used, the first is row 2: "
    assert report in capsys.readouterr().out


@pytest.mark.parametrize("rows, flags, message", [
    ([{"ask": "a", "answer": "b"}], {}, "no messages, no prompt with a completion, and no text"),
    ([], {}, "rows.jsonl"),
    ([{"messages": CHAT}] * 10, {}, "too few different prompts"),
    ([{"messages": CHAT}], {"eval_dataset": "same"}, "is what is trained on"),
])
def test_bad_rows_end_in_one_line_before_the_model_is_loaded(
        rows, flags, message, tmp_path, write_jsonl, refused, monkeypatch):
    """And leave no folder behind."""
    monkeypatch.setattr(common, "load_model", lambda *args, **kwargs: pytest.fail("it was loaded"))
    file = write_jsonl(rows)
    flags = {name: file for name in flags}
    args = run_args(sft, dataset=file, output_dir=tmp_path / "run", **flags)
    assert message in refused(sft.train, args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("row", [{"messages": LONG}, {"text": "1 + 1 = 2 and 2 + 2 = 4"},
                                 {"prompt": "1 + 1 = 2 and 2 + 2", "completion": " = 4"}])
def test_shortening_keeps_the_end_of_the_prompt_and_something_to_train(tokenizer, row):
    """BOS and system message stay, and the end of the prompt; the answer is cut after that."""
    [whole] = [x["tokens"] for x in sft.encode_conversation(row, tokenizer, 512)]
    size, start = len(whole["input_ids"]), whole["loss_mask"].index(1)
    (head, _), *_ = common.encode(tokenizer, *sft.prompt_and_answer(row, tokenizer))[0]
    head = len(head)
    for max_length in range(2 * head + 4, size + 2):
        [encoded] = sft.encode_conversation(row, tokenizer, max_length)
        example = encoded["tokens"]
        length, first = len(example["input_ids"]), example["loss_mask"].index(1)
        assert length == min(size, max_length) and first > 0
        cut = start - first  # tokens that the prompt lost
        assert cut >= 0
        for name, ids in example.items():
            assert ids == (whole[name][:head] + whole[name][head + cut:])[:length]
        room = max(max_length // 2, head + max_length // 4)
        if cut > 0:
            assert first >= room
        if cut + length < size:  # the answer lost its end
            assert first <= room


def test_padding_is_on_the_right_and_known_by_length():
    """Pad may be eos, which also ends an answer in the middle of a conversation."""
    rows = [{"input_ids": [5, 0, 6, 0], "loss_mask": [0, 1, 0, 1], "attention_mask": [1] * 4},
            {"input_ids": [5, 0], "loss_mask": [0, 1], "attention_mask": [1] * 2}]
    for pad in 0, 7:
        batch = sft.collate(rows, pad, "cpu")
        assert batch["input_ids"].tolist() == [[5, 0, 6, 0], [5, 0, pad, pad]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
        assert batch["loss_mask"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]


# ---- sampled answers -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def chat():
    """The trained tiny model; its sharpness can be set by the scale of its last norm."""
    tokenizer = common.load_tokenizer(str(ROOT / "tiny/chat"))
    return common.load_model(str(ROOT / "tiny/chat"), trainable=False), tokenizer


@pytest.fixture
def sharpness(chat):
    weight = common.causal_lm(chat[0]).model.norm.weight
    kept = weight.data.clone()
    yield lambda factor: weight.data.copy_(kept * factor)
    weight.data.copy_(kept)


def test_an_answer_does_not_depend_on_the_prompts_beside_it(chat, sharpness):
    """Sharpened until sampling is greedy: each equals token by token argmax of its own prompt."""
    model, tokenizer = chat
    sharpness(1e4)
    prompts = []
    for text in "What is 12 + 5?", "Tom has 31 figs and gets 16 more. How many figs now?":
        prompts.append(common.encode_prompt(tokenizer, [{"role": "user", "content": text}]))
    answers = sft.sample_answers(model, tokenizer, prompts, 16, 0)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        while ids[-1] != tokenizer.eos_token_id or len(ids) == len(prompt):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        size = len(ids) - len(prompt)
        assert answer[:size] == ids[len(prompt):]
        assert set(answer[size:]) <= {tokenizer.pad_token_id}
    assert model.training


def test_the_models_own_generation_config_only_adds_stop_tokens(chat, sharpness, monkeypatch):
    """Its top-k, top-p, penalties and temperature change nothing; all tokens can be sampled."""
    model, tokenizer = chat
    sharpness(0.02)  # next to uniform
    prompts = [[5, 6, 7, 8]] * 1500
    answers = sft.sample_answers(model, tokenizer, prompts, 1, seed=0)
    assert len({token for token, in answers}) > 330  # of 369
    sharpness(0.4)  # a repetition penalty would show
    plain = sft.sample_answers(model, tokenizer, prompts[:4], 12, seed=0)
    for name, value in {"top_k": 3, "top_p": 0.1, "min_p": 0.5, "typical_p": 0.1,
                        "temperature": 0.1, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1,
                        "do_sample": False}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert sft.sample_answers(model, tokenizer, prompts[:4], 12, seed=0) == plain
    assert sft.sample_answers(model, tokenizer, prompts[:4], 12, seed=1) != plain
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    row = next(i for i in range(4) if not ends & set(plain[i][:8]))
    stop = plain[row][3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, stop])
    stopped = sft.sample_answers(model, tokenizer, prompts[:4], 12, seed=0)[row]
    end = plain[row].index(stop) + 1
    assert stopped[:end] == plain[row][:end] and set(stopped[end:]) <= {tokenizer.pad_token_id}


def test_an_answer_that_ends_at_the_limit_by_itself_has_stopped(chat):
    """Two of four answers end, one of them with their last possible token."""
    model, tokenizer = chat
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    answers = [[5, 6, end], [5, 6, 7], [end, pad, pad], [5, 6, 7]]
    assert sft.share_stopped(answers, [end]) == 0.5


def test_the_held_out_loss_falls_on_real_stories(tmp_path, shared, write_jsonl):
    """A small model that was really trained gets better at rows that it is not trained on."""
    stories = shared / "data/sft_tinystories_prompt_completion.jsonl"
    rows = [json.loads(line) for line in stories.read_text().splitlines()[:80]]
    sft.train(run_args(
        sft, model=shared / "models/stories260K", dataset=write_jsonl(rows), max_steps=8,
        batch_size=8, micro_batch_size=8, eval_size=16, learning_rate=3e-3, max_length=128,
        max_new_tokens=2, output_dir=tmp_path / "run"))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.01
