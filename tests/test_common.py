"""Loading and encoding: what is trained, what is frozen, where the mask lies, how bad input ends."""
import contextlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import common
import dpo
import evaluate
import huggingface_hub.constants
import peft
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from transformers.integrations import sdpa_attention

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
TINY, BASE = str(ROOT / "tiny/chat"), str(ROOT / "tiny/base")
TEMPLATES = ["Qwen2.5-0.5B", "Qwen2.5-0.5B-Instruct", "SmolLM2-135M-Instruct", "tiny"]
USER, ANSWER = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "2 + 2 = 4"}
AGAIN, FINAL = {"role": "user", "content": "And twice\nthat?"}, {"role": "assistant", "content": "It is 8.\n\nEasy!"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = {"one turn": [USER, ANSWER], "two turns": [USER, ANSWER, AGAIN, FINAL], "system": [SYSTEM, USER, ANSWER, AGAIN, FINAL],
         "user last": [USER, ANSWER, AGAIN], "empty answer": [USER, ANSWER | {"content": ""}]}


def shared(name):
    """A file of ../shared, or a skipped test."""
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not on this machine")
    return str(SHARED / name)


@pytest.fixture(scope="module")
def tokenizers():
    """Published tokenizers by name, each loaded once and as published (load_tokenizer would change a base model's template)."""
    loaded = {}

    def get(name):
        if name not in loaded:
            loaded[name] = transformers.AutoTokenizer.from_pretrained(TINY if name == "tiny" else shared(f"tokenizers/{name}"))
        return loaded[name]
    return get


@pytest.fixture
def tiny_tokenizer():
    """A tokenizer of its own for each test that changes it."""
    return transformers.AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def offline(monkeypatch):
    """No waiting for a network: HF_HUB_OFFLINE is read when the library is imported, so its constant is set."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@contextlib.contextmanager
def exits(capsys, *words):
    """The block ends the program with exit code 2 and one line on stderr that holds `words`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]


def masked(tokenizer, input_ids, loss_mask):
    return tokenizer.decode([i for i, trained in zip(input_ids, loss_mask) if trained])


IDS = torch.tensor([[5, 9, 17, 33, 80, 12, 7, 101], [3, 44, 21, 8, 60, 61, 62, 63]])


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def train(model, steps=3, lr=1e-2, labels=IDS):
    """A few optimizer steps on whatever the model calls trainable."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model.train()
        out = model(input_ids=IDS)
        loss = -out.logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None]).mean() if out.logits.dim() == 3 else (out.logits - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def save(model, folder):
    """As the scripts save a run."""
    model.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A trained causal adapter on the tiny model, and the logits it had when it was saved."""
    torch.manual_seed(1)
    model = train(common.load_model(TINY, lora_rank=4)).eval()
    return SimpleNamespace(path=save(model, tmp_path_factory.mktemp("adapter")), logits=logits(model))


# ---- chats ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_mask_covers_exactly_the_assistant_turns(tokenizers, name, chat):
    """The trained text is every assistant's content with its end-of-turn token, once, in order, and nothing else."""
    tokenizer, messages = tokenizers(name), CHATS[chat]
    ids, mask = common.encode_chat(tokenizer, messages)
    assert len(ids) == len(mask) and set(mask) == {0, 1}
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert masked(tokenizer, ids, mask) == "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_newline_after_the_end_of_turn_is_not_trained(tokenizers, name):
    """Each trained run ends with <|im_end|>, also where that is the pad token, and the newline that follows has mask 0."""
    tokenizer = tokenizers(name)
    ids, mask = common.encode_chat(tokenizer, CHATS["two turns"])
    ends = [i for i in range(len(ids)) if mask[i] and not mask[i + 1]]
    assert [tokenizer.decode([ids[i]]) for i in ends] == ["<|im_end|>"] * 2
    assert [tokenizer.decode([ids[i + 1]]) for i in ends] == ["\n"] * 2
    assert name != "SmolLM2-135M-Instruct" or tokenizer.pad_token_id == ids[ends[0]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_is_a_prefix_of_the_row(tokenizers, name):
    """What the model is given to answer is what stands before the first trained token in training."""
    tokenizer = tokenizers(name)
    for answers, start in (([USER, ANSWER], 1), ([SYSTEM, USER, ANSWER], 2), (CHATS["two turns"], 3)):
        ids, mask = common.encode_chat(tokenizer, answers, first_trained=start)
        assert common.encode_prompt(tokenizer, answers[:start]) == ids[:mask.index(1)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_first_trained_leaves_out_the_turns_before_it(tokenizers, name):
    """first_trained changes the mask alone: assistant turns with a smaller message number are context."""
    tokenizer, messages = tokenizers(name), CHATS["system"]
    ids, mask = common.encode_chat(tokenizer, messages, first_trained=3)
    assert ids == common.encode_chat(tokenizer, messages)[0]
    assert masked(tokenizer, ids, mask) == FINAL["content"] + "<|im_end|>"
    assert sum(common.encode_chat(tokenizer, messages, first_trained=5)[1]) == 0


def test_answer_that_starts_with_a_newline(tokenizers):
    """An answer whose newline merges with the header's is encoded, or refused for that reason, not blamed on a template that rewrites turns."""
    tokenizer = tokenizers("Qwen2.5-0.5B-Instruct")
    try:
        assert masked(tokenizer, *common.encode_chat(tokenizer, [USER, ANSWER | {"content": "\n\nFour."}])).endswith("Four.<|im_end|>")
    except ValueError as error:
        assert "rewrites" not in str(error)


def test_template_that_rewrites_earlier_turns_is_refused(tiny_tokenizer):
    """A template that drops the thoughts of earlier answers cannot be masked by prefixes: refused; its one-turn chats are fine."""
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content if loop.last else m.content.split('=')[-1]) + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    ids, mask = common.encode_chat(tiny_tokenizer, [USER, ANSWER])
    assert masked(tiny_tokenizer, ids, mask) == "2 + 2 = 4<|im_end|>"
    with pytest.raises(ValueError, match="rewrites"):
        common.encode_chat(tiny_tokenizer, [USER, ANSWER, AGAIN, FINAL])


def test_template_that_refuses_a_role(tiny_tokenizer):
    """A template's own raise_exception becomes a ValueError with its words."""
    tiny_tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + tiny_tokenizer.chat_template
    common.encode_chat(tiny_tokenizer, [USER, ANSWER])
    with pytest.raises(ValueError, match="no system role here"):
        common.encode_chat(tiny_tokenizer, [SYSTEM, USER, ANSWER])


@pytest.mark.parametrize("messages, words", [
    ([ANSWER], "roles out of order: message 1"),
    ([USER, USER], "roles out of order: message 2"),
    ([USER, ANSWER, ANSWER], "roles out of order: message 3"),
    ([USER, SYSTEM], "roles out of order: message 2"),
    ([SYSTEM, ANSWER], "roles out of order: message 2"),
    ([{"role": "human", "content": "x"}], "message 1"),
    ([USER, {"role": "assistant"}], "message 2 must be"),
    ([USER, {"role": "assistant", "content": None}], "message 2 must be"),
    ([USER, "4"], "message 2 must be"),
])
def test_bad_conversations_are_refused(tokenizers, messages, words):
    """Roles out of order and things that are no messages raise ValueError with the message's number."""
    with pytest.raises(ValueError, match=words):
        common.encode_chat(tokenizers("tiny"), messages)


def test_messages_need_a_template():
    """Messages for a model without a chat template are refused, strings are not."""
    tokenizer = common.load_tokenizer(shared("models/stories260K"))
    with pytest.raises(ValueError, match="no chat template"):
        common.encode_chat(tokenizer, [USER, ANSWER])
    assert common.end_of_turn_id(tokenizer) is None and common.encode_prompt(tokenizer, "Once")


# ---- strings ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["models/stories260K", "tokenizers/Qwen2.5-0.5B"])
def test_text_is_tokenised_as_one(name):
    """The ids are those of the whole text plus eos, the mask holds the completion and eos, the prompt's ids come first."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared(name))
    prompt, completion = "Once upon a time, there was a", " little girl named Lily."
    ids, mask = common.encode_text(tokenizer, prompt, completion)
    whole, apart = tokenizer(prompt + completion)["input_ids"], tokenizer(prompt)["input_ids"]
    assert ids == whole + [tokenizer.eos_token_id]
    assert mask == [0] * len(apart) + [1] * (len(ids) - len(apart))
    assert tokenizer.decode([i for i, m in zip(ids[:-1], mask) if m]).strip() == completion.strip()
    assert common.encode_prompt(tokenizer, prompt) == apart == ids[:len(apart)]


@pytest.mark.parametrize("name, prompt, completion, token", [
    ("tokenizers/Qwen2.5-0.5B", "They are run", "ning home.", " running"), ("models/stories260K", "Once upon a ti", "me.", "time")])
def test_token_that_spans_the_border_is_trained(name, prompt, completion, token):
    """Where prompt and completion share a token, that token is the first trained one, and no token is lost or split."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared(name))
    ids, mask = common.encode_text(tokenizer, prompt, completion)
    first = mask.index(1)
    assert ids[:-1] == tokenizer(prompt + completion)["input_ids"] and tokenizer.decode([ids[first]]).strip() == token.strip()
    assert ids[:first] == tokenizer(prompt)["input_ids"][:first] and mask[first:] == [1] * (len(ids) - first)
    assert common.encode_prompt(tokenizer, prompt) == tokenizer(prompt)["input_ids"] != ids[:first]


def test_empty_completion_is_refused(tokenizers):
    """Nothing to learn is an error, not a row that teaches silence."""
    with pytest.raises(ValueError, match="empty"):
        common.encode_text(tokenizers("tiny"), "Add 1 and 2.", "")


def test_pad_that_is_eos_does_not_shorten_the_mask(tmp_path):
    """A tokenizer without a pad token gets eos as pad, and the trained eos still has mask 1 and a log-prob in a padded batch."""
    shutil.copytree(TINY, tmp_path / "m")
    config = json.loads((tmp_path / "m/tokenizer_config.json").read_text()) | {"pad_token": None}
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, usual = common.load_tokenizer(str(tmp_path / "m")), common.load_tokenizer(TINY)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id != usual.pad_token_id
    for encode in (lambda t: common.encode_chat(t, [USER, ANSWER]), lambda t: common.encode_text(t, "Add 1", " and 2.")):
        assert encode(tokenizer) == encode(usual)
    ids, mask = common.encode_text(tokenizer, "Add 1", " and 2.")
    pair = {"chosen": ids, "chosen_mask": mask, "rejected": ids + ids, "rejected_mask": mask + mask}
    batch = dpo.collate([pair], tokenizer.pad_token_id, "cpu")
    logps, _ = dpo.completion_logps(common.load_model(TINY), **batch)
    assert batch["attention_mask"][0].tolist() == [1] * len(ids) + [0] * len(ids)
    assert (logps[0] != 0).tolist() == [m == 1 for m in mask[1:]] + [False] * len(ids)


# ---- stop tokens and base models --------------------------------------------------------------------------

def test_stop_tokens_come_from_all_three_sources(tokenizers):
    """eos, the template's end of turn and everything in generation_config.eos_token_id, be it a number, a list or missing."""
    tokenizer = tokenizers("Qwen2.5-0.5B")
    eos, end = 151643, 151645
    assert common.stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=[11, 7])) == [7, 11, eos, end]
    assert common.stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=7)) == [7, eos, end]
    assert common.stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=None)) == [eos, end]
    assert common.stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=7), template=False) == [7, eos]


def qwen_folder(folder, name, eos):
    """A model folder as far as load_tokenizer looks: the published tokenizer and what the published configs say about eos."""
    shutil.copytree(shared(f"tokenizers/{name}"), folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "eos_token_id": 151643}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return str(folder)


def test_base_model_ends_answers_with_a_token_it_knows(tmp_path, tokenizers, capsys):
    """Only the end of assistant turns changes, to <|endoftext|>; user and system turns stay; it is said; saved and reloaded it stays the same."""
    name, plain = qwen_folder(tmp_path / "m", "Qwen2.5-0.5B", 151643), tokenizers("Qwen2.5-0.5B")
    tokenizer = common.load_tokenizer(name)
    assert "<|endoftext|>" in capsys.readouterr().out
    assert common.end_of_turn_id(tokenizer) == tokenizer.eos_token_id != common.end_of_turn_id(plain)
    tricky = [SYSTEM, USER | {"content": "Say 'a<|im_end|>b' \\n {{ x }} {% y %} \"q\""}, ANSWER, AGAIN, FINAL]
    for messages in [*CHATS.values(), tricky]:
        text = plain.apply_chat_template(messages, tokenize=False)
        for m in messages:
            if m["role"] == "assistant":
                text = text.replace(f"<|im_start|>assistant\n{m['content']}<|im_end|>", f"<|im_start|>assistant\n{m['content']}<|endoftext|>")
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text
        ids, mask = common.encode_chat(tokenizer, messages)
        assert masked(tokenizer, ids, mask) == "".join(m["content"] + "<|endoftext|>" for m in messages if m["role"] == "assistant")
        if messages[-1]["role"] == "user":
            assert common.encode_prompt(tokenizer, messages) == ids + common.encode_prompt(plain, [USER])[-3:]  # <|im_start|>assistant\n
    tokenizer.save_pretrained(name)
    again = common.load_tokenizer(name)
    assert again.chat_template == tokenizer.chat_template and capsys.readouterr().out == ""


def test_chat_model_keeps_its_template(tmp_path, tokenizers, capsys):
    """A model whose generation config or eos knows the end of turn is left alone."""
    for name, eos in (("Qwen2.5-0.5B-Instruct", [151645, 151643]), ("Qwen2.5-0.5B", [151645, 151643])):
        assert common.load_tokenizer(qwen_folder(tmp_path / name, name, eos)).chat_template == tokenizers(name).chat_template
    assert common.load_tokenizer(TINY).chat_template == tokenizers("tiny").chat_template and capsys.readouterr().out == ""


def test_generation_config_file_is_optional(tmp_path):
    """Many published models have no generation_config.json; config.json names their eos, and model and tokenizer load."""
    shutil.copytree(TINY, tmp_path / "m")
    (tmp_path / "m/generation_config.json").unlink()
    assert common.load_model(str(tmp_path / "m")).generation_config.eos_token_id == 2
    assert common.load_tokenizer(str(tmp_path / "m")).chat_template == common.load_tokenizer(TINY).chat_template


@pytest.mark.parametrize("handled", [True, False])
def test_tuned_base_learns_to_stop(handled):
    """A few dozen LoRA steps teach the base to answer in form and to stop; had its template kept <|im_end|>, it would never stop."""
    tokenizer = common.load_tokenizer(BASE) if handled else transformers.AutoTokenizer.from_pretrained(BASE)
    torch.manual_seed(0)
    model = common.load_model(BASE)
    rows = [json.loads(line)["messages"] for line in (ROOT / "tiny/data/sft_train.jsonl").read_text().splitlines()[:1010]]
    stop_ids = common.stop_token_ids(tokenizer, model.generation_config)
    prompts = [common.encode_prompt(tokenizer, row[:1]) for row in rows[-50:]]

    def stopped():
        answers = evaluate.sample(model, prompts, 2, 40, 1.0, stop_ids, tokenizer.pad_token_id, seed=0)
        return sum(bool(re.fullmatch(r"\d+ [+-] .*", tokenizer.decode(answer[:-1]))) and answer[-1] in stop_ids for answer in answers) / len(answers)

    before, optimizer = stopped(), torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for i in range(0, 960, 24):
        encoded = [common.encode_chat(tokenizer, row) for row in rows[i:i + 24]]
        half = [{"chosen": a, "chosen_mask": am, "rejected": b, "rejected_mask": bm} for (a, am), (b, bm) in zip(encoded[:12], encoded[12:])]
        batch = dpo.collate(half, tokenizer.pad_token_id, "cpu")
        (-dpo.completion_logps(model, **batch)[0].sum() / batch["loss_mask"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = stopped()
    assert before < 0.1 and (after > 0.9 if handled else after < 0.1), (before, after)


# ---- loading ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((7, 0), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_dtype_goes_by_compute_capability(monkeypatch, capability, dtype):
    """A T4 gets fp16 though torch says that it supports bf16; Ampere and later get bf16; a CPU fp32."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    assert common.choose_dtype(torch.device("cuda", 0)) == dtype
    assert common.choose_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("bits", ["on", "off"])
def test_lora_is_on_all_linear_layers_but_the_head(bits):
    """Every linear layer of the backbone has a LoRA of the asked rank, the head has none, and nothing but LoRA is trainable, in fp32."""
    model = common.load_model(TINY, load_in_4bit=bits, lora_rank=3)
    causal = common.causal_lm(model)
    with_lora = {name for name, m in causal.named_modules() if hasattr(m, "lora_A")}
    linear = {name for name, m in common.causal_lm(common.load_model(TINY, trainable=False)).named_modules() if isinstance(m, torch.nn.Linear)}
    assert with_lora == linear - {"lm_head"} and len(with_lora) == 5 * 7
    assert {p.shape[0] for n, p in model.named_parameters() if "lora_A" in n} == {3}
    assert all(p.requires_grad == ("lora_" in n) and (p.dtype == torch.float32 or not p.requires_grad) for n, p in model.named_parameters())
    quantised = {name.removesuffix(".base_layer") for name, m in causal.named_modules() if isinstance(m, Linear4bit)}
    assert quantised == (with_lora if bits == "on" else set()) and common.describe(model)["load_in_4bit"] == (bits == "on")


def test_four_bit_training_on_cpu():
    """4-bit on a CPU: steps move LoRA and no other bit, eval and train forwards take turns (the AVX512 trap), and it generates."""
    torch.manual_seed(0)
    model = common.load_model(TINY, load_in_4bit="on", lora_rank=4, gradient_checkpointing="on")
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    start = logits(model.eval())
    train(model, steps=2)
    first = logits(model.eval())
    train(model, steps=1)
    changed = {name for name, value in before.items() if not torch.equal(value, model.state_dict()[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert not torch.equal(start, first) and not torch.equal(first, logits(model.eval()))
    with common.reference(model):
        torch.testing.assert_close(logits(model), start, rtol=0, atol=0)
    assert model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False).shape == (2, 11)


def test_four_bit_is_the_model_with_rounded_weights():
    """The 4-bit model computes what the full model computes with NF4's dequantised weights: nothing else was changed or skipped."""
    full, small = (common.load_model(TINY, load_in_4bit=bits, trainable=False) for bits in ("off", "on"))
    unrounded = logits(full)
    for name, module in small.named_modules():
        if isinstance(module, Linear4bit):
            assert module.weight.quant_state.quant_type == "nf4" and module.weight.quant_state.nested
            full.get_submodule(name).weight.data = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    torch.testing.assert_close(logits(small), logits(full), rtol=1e-3, atol=1e-3)
    assert (logits(small) - unrounded).abs().max() > 0.1


def test_untrainable_load_has_nothing_to_train():
    """trainable=False gives the bare model in eval mode; rank 0 trains everything in fp32."""
    used, full = common.load_model(TINY, trainable=False), common.load_model(TINY, lora_rank=0)
    assert not used.training and not any(p.requires_grad for p in used.parameters()) and not isinstance(used, peft.PeftModel)
    assert full.training and all(p.requires_grad and p.dtype == torch.float32 for p in full.parameters())
    torch.testing.assert_close(logits(used), logits(full.eval()), rtol=0, atol=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    """Activations computed twice are the same ones: equal gradients in all LoRA matrices, none of them zero."""
    grads = []
    for setting in ("off", "on"):
        torch.manual_seed(0)
        model = common.load_model(TINY, lora_rank=2, gradient_checkpointing=setting)
        assert common.describe(model)["gradient_checkpointing"] == (setting == "on")
        for n, p in model.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p, std=0.02)
        model(input_ids=IDS).logits.log_softmax(-1)[..., 7].sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(g.abs().max() > 0 for g in grads[0].values())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


def test_attention_below_ampere_repeats_keys_itself(monkeypatch):
    """Below capability 8.0 SDPA is no longer asked for enable_gqa, above it still is, and the logits are the same."""
    original, asked = sdpa_attention.use_gqa_in_sdpa, []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", original)  # restored at the end
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: asked.append(bool(k.get("enable_gqa"))) or sdpa(*a, **k))
    model, outputs = common.load_model(TINY, trainable=False), []
    monkeypatch.setattr(common, "choose_device", lambda: torch.device("meta"))  # stands in for a GPU up to the forward pass
    for capability in ((8, 0), (7, 5)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, capability=capability: capability)
        with contextlib.suppress(Exception):
            common.load_model(TINY, load_in_4bit="off", trainable=False)
        asked.clear()
        outputs.append(logits(model))
        assert set(asked) == {capability == (8, 0)}
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, extra", [
    ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8}), ("Cohere", {"logit_scale": 0.1}), ("Granite", {"logits_scaling": 4.0})])
def test_models_that_change_their_logits_are_refused(capsys, tmp_path, kind, extra):
    """Capped or scaled logits would be scored as what they are not: refused by name; the same model without the change is accepted."""
    shape = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                 initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config, model = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}ForCausalLM")
    neutral = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
    torch.manual_seed(0)
    plain, changed = (model(config(**shape, **values)) for values in ({name: neutral.get(name, value) for name, value in extra.items()}, extra))
    common.check_head(plain)
    with exits(capsys, f"{kind}ForCausalLM"):
        common.check_head(changed)
    if kind != "Gemma2":  # transformers has no sdpa for it
        changed.save_pretrained(tmp_path / "changed")
        with exits(capsys, f"{kind}ForCausalLM changes its logits"):
            common.load_model(str(tmp_path / "changed"))


# ---- the reference ----------------------------------------------------------------------------------------

def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_reference_is_the_start_and_stays_it(start, adapter):
    """Bit for bit, the reference gives the start's logits before training and after it, while the policy moves away."""
    model = common.load_model(TINY if start == "base" else adapter.path)
    expected = logits(common.load_model(TINY, trainable=False)) if start == "base" else adapter.logits
    for moved in (False, True):
        if moved:
            train(model)
        model.eval()
        assert torch.equal(logits(model), expected) != moved
        with common.reference(model):
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected) != moved


def test_adapters_off_is_not_the_reference_of_an_adapter(adapter):
    """A run that starts from an adapter must not be compared with the base below it."""
    model = common.load_model(adapter.path).eval()
    with model.disable_adapter():
        off = logits(model)
    assert torch.equal(off, logits(common.load_model(TINY, trainable=False))) and (off - adapter.logits).abs().max() > 0.1


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_reference_restores_the_policy(start, adapter):
    """After the block, also one left by an exception, the active adapter and what is trainable are as before: all of default, only default."""
    model = common.load_model(TINY if start == "base" else adapter.path)
    wanted = {n for n, _ in model.named_parameters() if "lora_" in n and ".default." in n}
    assert trainable(model) == wanted and wanted
    for error in (None, KeyError):
        with contextlib.suppress(KeyError), common.reference(model):
            assert not any(".reference." in n for n in trainable(model))
            if error:
                raise error
        assert model.active_adapter == "default" and trainable(model) == wanted and model.training
        policy = logits(model.eval())
        with torch.no_grad():
            saved = {n: p.clone() for n, p in model.named_parameters() if "lora_B" in n and ".default." in n}
            for n, p in model.named_parameters():
                if n in saved:
                    p.add_(0.1)
            assert not torch.equal(logits(model), policy)  # the default adapter is the one in use
            for n, p in model.named_parameters():
                if n in saved:
                    p.copy_(saved[n])
        model.train()


def test_gradients_cross_a_reference_pass(adapter):
    """Policy forward, reference forward, backward, as DPO does it: the gradients are those without the reference in between."""
    model, grads = common.load_model(adapter.path), []
    for between in (False, True):
        loss = model(input_ids=IDS).logits.log_softmax(-1)[..., 3].sum()
        if between:
            with torch.no_grad(), common.reference(model):
                model(input_ids=IDS)
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert grads[0].keys() == trainable(model)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


# ---- saved runs and other roles ---------------------------------------------------------------------------

def test_saved_adapter_loads_with_peft_alone(adapter):
    """AutoPeftModelForCausalLM reads what a script saved, and gives the same logits as this loader; only the policy was saved."""
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(adapter.path, dtype=torch.float32)
    torch.testing.assert_close(logits(theirs.eval()), adapter.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(common.load_model(adapter.path, trainable=False)), adapter.logits, rtol=0, atol=0)


def test_second_generation_adapter_is_saved_alone(adapter, tmp_path):
    """A run that started from an adapter leaves one adapter, the trained one, in the place where peft and vLLM look for it."""
    model = train(common.load_model(adapter.path)).eval()
    path = save(model, tmp_path / "run")
    assert [p.relative_to(path).as_posix() for p in Path(path).rglob("*.safetensors")] == ["adapter_model.safetensors"]
    assert torch.equal(logits(common.load_model(path, trainable=False)), logits(model)) and not torch.equal(logits(model), adapter.logits)


def scores(model):
    return logits(model.eval())[:, 0]


@pytest.mark.parametrize("start, bits", [("base", "off"), ("adapter", "off"), ("base", "on")])
def test_reward_model_saves_and_loads(start, bits, adapter, tmp_path):
    """A scalar head trains beside LoRA, whatever the start; saved and loaded it gives the same scores, and it starts a further run."""
    torch.manual_seed(0)
    model = common.load_model(TINY if start == "base" else adapter.path, load_in_4bit=bits, lora_rank=4, task="SEQ_CLS")
    heads = {n for n in trainable(model) if "lora_" not in n}
    assert all("score.modules_to_save.default" in n for n in heads) and len(heads) == 1 and len(trainable(model)) == 1 + 2 * 5 * 7
    before = scores(model)
    head = next(p for n, p in model.named_parameters() if n in heads)
    old = head.detach().clone()
    after = scores(train(model))
    assert before.shape == (2,) and not torch.equal(before, after) and not torch.equal(head, old) and head.dtype == torch.float32
    path = save(model, tmp_path / "rm")
    for kind in (False, True):
        torch.testing.assert_close(scores(common.load_model(path, load_in_4bit=bits, trainable=kind, task="SEQ_CLS")), after, rtol=1e-6, atol=1e-6)


def test_reward_model_takes_over_a_causal_adapter(adapter):
    """Started from a language model's adapter, the reward model's backbone is that tuned model: same matrices, same hidden states."""
    model = common.load_model(adapter.path, task="SEQ_CLS").eval()
    ours = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    saved = common.load_peft_weights(adapter.path, device="cpu")
    assert ours.keys() == saved.keys() and all(torch.equal(ours[n], saved[n]) for n in saved)
    causal = common.load_model(adapter.path, trainable=False)
    hidden = [common.causal_lm(m).base_model(input_ids=IDS).last_hidden_state for m in (model, causal)]
    assert torch.equal(*hidden)


def test_adapters_of_the_wrong_task_are_refused(adapter, tmp_path, capsys):
    """A reward model is no language model, and a language model's adapter has no scores to use."""
    path = save(common.load_model(TINY, task="SEQ_CLS"), tmp_path / "rm")
    with exits(capsys, path, "SEQ_CLS", "CAUSAL_LM"):
        common.load_model(path)
    with exits(capsys, adapter.path, "SEQ_CLS", "CAUSAL_LM"):
        common.load_model(adapter.path, task="SEQ_CLS", trainable=False)


def test_no_dropout_is_left(adapter, tmp_path):
    """An adapter that was trained with dropout elsewhere: the policy, its reference and its samples must agree on every log-prob."""
    shutil.copytree(adapter.path, tmp_path / "dropout")
    config = json.loads((tmp_path / "dropout/adapter_config.json").read_text())
    (tmp_path / "dropout/adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.5}))
    model = common.load_model(str(tmp_path / "dropout"))
    ids = torch.arange(3, 40)[None]
    assert model.training and torch.equal(model(ids).logits, model(ids).logits)
    with common.reference(model):
        assert torch.equal(model(ids).logits, model.eval()(ids).logits)


def test_a_tiny_model_of_which_all_weights_were_trained_is_tiny(tmp_path):
    """Its folder is no adapter, but its summary says where it came from; what came from another model is not tiny."""
    for name, origin in (("full", TINY), ("full2", str(tmp_path / "full")), ("other", "Qwen/Qwen2.5-0.5B")):
        shutil.copytree(TINY, tmp_path / name)
        (tmp_path / name / "summary.json").write_text(json.dumps({"model": origin}))
    assert [common.is_tiny(str(tmp_path / name)) for name in ("full", "full2", "other")] == [True, True, False]


def test_is_tiny(adapter, tmp_path, monkeypatch):
    """The embedded models and adapters on them, from any folder; not a copy, another model, a missing folder or a Hub name."""
    shutil.copytree(TINY, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    assert all(map(common.is_tiny, ["tiny/chat", "tiny/base", TINY, adapter.path]))
    assert not any(map(common.is_tiny, ["copy", str(tmp_path), "no/such", "Qwen/Qwen2.5-0.5B", "tiny/none"]))


# ---- bad input --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("load", [common.load_model, common.load_tokenizer])
def test_unknown_model(load, offline, capsys):
    """A name that is no folder and that the Hub does not give ends in one line with the name."""
    with exits(capsys, "no-such-org/no-such-model"):
        load("no-such-org/no-such-model")


@pytest.mark.parametrize("load, breakage", [
    (common.load_tokenizer, "empty"), (common.load_tokenizer, "config"), (common.load_tokenizer, "base gone"), (common.load_model, "empty"),
    (common.load_model, "config"), (common.load_model, "adapter"), (common.load_model, "base gone"), (common.load_model, "weights")])
def test_broken_folder(load, breakage, tmp_path, offline, capsys):
    """A folder without a model, with broken files or with an adapter whose base is gone ends in one line that names it."""
    folder = tmp_path / "broken"
    if breakage == "empty":
        folder.mkdir()
    else:
        shutil.copytree(TINY, folder)
    if breakage == "config":
        (folder / "config.json").write_text("{not json")
        (folder / "tokenizer.json").write_text("{not json")
    elif breakage == "adapter":
        (folder / "adapter_config.json").write_text("{not json")
    elif breakage == "base gone":
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "gone/model"}))
    elif breakage == "weights":
        (folder / "model.safetensors").write_bytes(b"broken")
    with exits(capsys, str(folder)):
        load(str(folder))


def test_full_training_goes_without_lora_or_4bit(adapter, capsys):
    """--lora-rank 0 contradicts --load-in-4bit on and a LoRA adapter as the start."""
    with exits(capsys, "--lora-rank 0"):
        common.load_model(TINY, load_in_4bit="on", lora_rank=0)
    with exits(capsys, "--lora-rank 0"):
        common.load_model(adapter.path, lora_rank=0)
