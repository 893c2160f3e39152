"""Loading: what is trained, what is frozen, who plays which role; and how bad input ends."""
import argparse
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import bitsandbytes
import huggingface_hub.constants
import peft
import pytest
import safetensors.torch
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from conftest import ROOT, encoded
from transformers.integrations import sdpa_attention

import common

TINY, BASE, REWARD = (str(ROOT / "tiny" / name) for name in ("chat", "base", "reward"))
IDS = torch.tensor([[5, 9, 17, 33, 80, 12, 7, 101], [3, 44, 21, 8, 60, 61, 62, 63]])
LAYERS = 5 * 7  # of the tiny model: seven linear ones in each of five blocks


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def train(model, steps=2):
    """A few optimizer steps on whatever the model calls trainable."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        out = model.train()(input_ids=IDS).logits
        loss = out.square().mean() if out.dim() == 2 else out.log_softmax(-1)[..., 7].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def save(model, folder):
    common.save_model(model, transformers.AutoTokenizer.from_pretrained(TINY), folder)
    return str(folder)


@pytest.fixture(scope="module")
def base_logits():
    return logits(common.load_model(TINY, trainable=False))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A trained adapter on the tiny model, and the logits it had when it was saved."""
    torch.manual_seed(1)
    model = train(common.load_model(TINY, lora_rank=4)).eval()
    path = save(model, tmp_path_factory.mktemp("adapter"))
    return SimpleNamespace(path=path, logits=logits(model))


# ---- number formats and machines -----------------------------------------------------------------

@pytest.mark.parametrize("capability, dtype", [
    ((7, 5), torch.float16), ((7, 0), torch.float16), ((8, 0), torch.bfloat16),
    ((9, 0), torch.bfloat16)])
def test_dtype_goes_by_compute_capability(monkeypatch, capability, dtype):
    """A T4 gets fp16 though torch says that it supports bf16; Ampere gets bf16, a CPU fp32."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    assert common.choose_dtype(torch.device("cuda", 0)) == dtype
    assert common.choose_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("dtype, scales", [
    (torch.float32, False), (torch.bfloat16, False), (torch.float16, True)])
def test_gradients_are_scaled_in_fp16_only(monkeypatch, dtype, scales):
    """And on a CPU, forward passes stay in fp32."""
    model = SimpleNamespace(device=torch.device("cpu"))
    with common.autocast(model):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    monkeypatch.setattr(common, "choose_dtype", lambda device: dtype)
    scaler = common.grad_scaler(model)
    assert scaler.is_enabled() == scales and (scaler.get_scale() > 1) == scales


def test_attention_below_ampere_repeats_keys_itself(monkeypatch, base_logits):
    """Below 8.0 SDPA is not asked for enable_gqa, above it is, and the logits are the same."""
    sdpa, asked = torch.nn.functional.scaled_dot_product_attention, []
    original = sdpa_attention.use_gqa_in_sdpa

    def spy(*args, **kwargs):
        asked.append(bool(kwargs.get("enable_gqa")))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", original)  # restored at the end
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model = common.load_model(TINY, trainable=False)
    for dtype in (torch.bfloat16, torch.float16):
        monkeypatch.setattr(common, "choose_dtype", lambda device, dtype=dtype: dtype)
        common.load_model(TINY, trainable=False)
        asked.clear()
        torch.testing.assert_close(logits(model), base_logits, rtol=1e-5, atol=1e-5)
        assert set(asked) == {dtype == torch.bfloat16}


# ---- what is loaded and trained ------------------------------------------------------------------

@pytest.mark.parametrize("bits", ["on", "off"])
def test_lora_is_on_all_linear_layers_but_the_head(bits, base_logits):
    """It has the rank asked for, nothing else is trained, it is fp32, and changes nothing yet."""
    model = common.load_model(TINY, load_in_4bit=bits, lora_rank=3)
    causal = common.causal_lm(model)
    with_lora = {name for name, m in causal.named_modules() if hasattr(m, "lora_A")}
    assert len(with_lora) == LAYERS and not any("lm_head" in name for name in with_lora)
    assert {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name} == {3}
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        assert p.dtype == torch.float32 or not p.requires_grad
    quantised = {name.removesuffix(".base_layer") for name, m in causal.named_modules()
                 if isinstance(m, Linear4bit)}
    assert quantised == (with_lora if bits == "on" else set())
    described = common.settings(model)
    assert described["load_in_4bit"] == (bits == "on") and described["device"] == "cpu"
    assert described["trainable_parameters"] == sum(
        p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert torch.equal(logits(model.eval()), base_logits) == (bits == "off")


def test_four_bit_training_on_cpu():
    """Steps move LoRA and no other bit, train and eval forwards take turns, and it generates."""
    torch.manual_seed(0)
    model = common.load_model(TINY, load_in_4bit="on", lora_rank=4, gradient_checkpointing="on")
    before = {name: value.clone() for name, value in model.state_dict().items()
              if isinstance(value, torch.Tensor)}
    start = logits(model.eval())  # with AVX512-BF16, the next training step used to fail
    train(model)
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if "lora_" in name}
    moved = logits(model.eval())
    with common.reference(model):
        torch.testing.assert_close(logits(model), start, rtol=0, atol=0)
    assert not torch.equal(start, moved)
    assert model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False).shape == (2, 11)


def test_four_bit_is_the_model_with_rounded_weights(base_logits):
    """It computes what the full model does with NF4's dequantised weights, and nothing else."""
    full = common.load_model(TINY, load_in_4bit="off", trainable=False)
    small = common.load_model(TINY, load_in_4bit="on", trainable=False)
    for name, module in small.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            assert state.quant_type == "nf4" and state.nested
            rounded = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
            full.get_submodule(name).weight.data = rounded.float()
    torch.testing.assert_close(logits(small), logits(full), rtol=1e-3, atol=1e-3)
    assert (logits(small) - base_logits).abs().max() > 0.1


def test_full_training_is_in_fp32_and_never_in_4_bits(adapter, base_logits, refused):
    """Rank 0 trains all weights in fp32, from a full model; a model to use has none to train."""
    used = common.load_model(TINY, trainable=False)
    assert not used.training and not trainable(used) and not isinstance(used, peft.PeftModel)
    full = common.load_model(TINY, load_in_4bit="on", lora_rank=0)
    assert full.training and {p.dtype for p in full.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in full.parameters())
    assert torch.equal(logits(full.eval()), base_logits)
    assert "--lora-rank 0" in refused(common.load_model, adapter.path, lora_rank=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    """Activations computed twice are the same: equal gradients in all LoRA matrices, none zero."""
    grads = []
    for setting in ("off", "on"):
        torch.manual_seed(0)
        model = common.load_model(TINY, lora_rank=2, gradient_checkpointing=setting)
        assert common.causal_lm(model).is_gradient_checkpointing == (setting == "on")
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
        model(input_ids=IDS).logits.log_softmax(-1)[..., 7].sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(grad.abs().max() > 0 for grad in grads[0].values())
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)


def test_no_dropout_is_left(adapter, tmp_path):
    """An adapter that was trained with dropout: policy, reference, sampler agree on log-probs."""
    shutil.copytree(adapter.path, tmp_path / "dropout")
    config = tmp_path / "dropout/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_dropout": 0.5}))
    model = common.load_model(str(tmp_path / "dropout"))
    assert model.training
    torch.testing.assert_close(model(IDS).logits, adapter.logits, rtol=0, atol=0)
    with common.reference(model):
        torch.testing.assert_close(model(IDS).logits, adapter.logits, rtol=0, atol=0)


def test_is_tiny(adapter, tmp_path, monkeypatch):
    """The embedded models and what was trained from them, from any folder; nothing else is."""
    for name, start in (("full", TINY), ("other", "Qwen/Qwen2.5-0.5B")):
        shutil.copytree(TINY, tmp_path / name)
        (tmp_path / name / "summary.json").write_text(json.dumps({"model": start}))
    shutil.copytree(TINY, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("tiny/chat", "tiny/base", "tiny/reward", TINY, adapter.path, "full"):
        assert common.is_tiny(name), name
    for name in ("other", "copy", str(tmp_path), "no/such", "Qwen/Qwen2.5-0.5B", "tiny/none"):
        assert not common.is_tiny(name), name


# ---- the reference -------------------------------------------------------------------------------

@pytest.mark.parametrize("start", ["base", "adapter"])
def test_the_reference_is_the_start_and_stays_it(start, adapter, base_logits):
    """Bit for bit, before training and after it; then the policy is back and what is trained."""
    model = common.load_model(TINY if start == "base" else adapter.path)
    expected = base_logits if start == "base" else adapter.logits
    own = {name for name, _ in model.named_parameters() if "lora_" in name and ".default." in name}
    for moved in (False, True):
        if moved:
            train(model)
        policy = logits(model.eval())
        assert torch.equal(policy, expected) != moved
        with common.reference(model):
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), policy)
        assert trainable(model) == own and len(own) == 2 * LAYERS
        assert model.active_adapter == "default"


def test_adapters_off_is_not_the_reference_of_an_adapter(adapter, base_logits):
    """A run that starts from an adapter must not be compared with the base below it."""
    model = common.load_model(adapter.path).eval()
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits)
    with common.reference(model):
        assert (logits(model) - base_logits).abs().max() > 0.1


def test_gradients_cross_a_reference_pass(adapter):
    """Policy forward, reference forward, backward: the gradients are those without the second."""
    model, grads = common.load_model(adapter.path, gradient_checkpointing="off"), []
    for between in (False, True):
        loss = model(input_ids=IDS).logits.log_softmax(-1)[..., 3].sum()
        if between:
            with torch.no_grad(), common.reference(model):
                model(input_ids=IDS)
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()
                      if p.grad is not None})
        model.zero_grad()
    assert grads[0].keys() == trainable(model)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


# ---- what is saved, and other roles --------------------------------------------------------------

@pytest.mark.parametrize("start", ["base", "adapter", "roles"])
def test_one_adapter_is_saved_and_peft_alone_loads_it(start, adapter, tmp_path):
    """In fp32, where peft looks for it; no base, reference, reward or critic weights."""
    model = common.load_model(TINY if start == "base" else adapter.path)
    if start == "roles":
        common.add_role(model, REWARD, "reward")
        common.add_role(model, None, "critic", trainable=True)
    train(model).eval()
    path = save(model, tmp_path / "run")
    files = [p.relative_to(path).as_posix() for p in (tmp_path / "run").rglob("*.safetensors")]
    assert files == ["adapter_model.safetensors"]
    saved = safetensors.torch.load_file(tmp_path / "run/adapter_model.safetensors")
    assert len(saved) == 2 * LAYERS and {x.dtype for x in saved.values()} == {torch.float32}
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    ours = common.load_model(path, trainable=False)
    assert torch.equal(logits(ours), logits(model)) and not torch.equal(logits(ours), IDS)
    assert not torch.equal(logits(model), adapter.logits)


@pytest.mark.parametrize("start, bits", [("base", "off"), ("adapter", "off"), ("base", "on")])
def test_a_reward_model_saves_and_loads(start, bits, adapter, tmp_path):
    """A scalar head trains beside LoRA; loaded to use or to train on, it gives the same scores."""
    torch.manual_seed(0)
    name = TINY if start == "base" else adapter.path
    model = common.load_model(name, load_in_4bit=bits, lora_rank=4, task="SEQ_CLS")
    heads = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert len(heads) == 1 and len(trainable(model)) == 1 + 2 * LAYERS
    (name, head), = heads.items()
    assert "score.modules_to_save.default" in name and head.dtype == torch.float32
    old, before = head.detach().clone(), logits(model.eval())
    after = logits(train(model).eval())
    assert before.shape == (2, 1)
    assert not torch.equal(before, after) and not torch.equal(head, old)
    path = save(model, tmp_path / "rm")
    for kind in (False, True):
        again = common.load_model(path, load_in_4bit=bits, trainable=kind, task="SEQ_CLS").eval()
        torch.testing.assert_close(logits(again), after, rtol=1e-6, atol=1e-6)
        assert len(trainable(again)) == (1 + 2 * LAYERS if kind else 0)


def test_a_reward_model_takes_over_a_causal_adapter(adapter):
    """Started from a language model's adapter, its backbone is that tuned model."""
    model = common.load_model(adapter.path, task="SEQ_CLS").eval()
    causal = common.load_model(adapter.path, trainable=False)
    hidden = [common.causal_lm(m).base_model(input_ids=IDS).last_hidden_state
              for m in (model, causal)]
    assert torch.equal(*hidden)


def test_roles_share_a_base_and_leave_each_other_alone(adapter):
    """The reward gives the reward model's scores, the critic starts as zero; the policy stays."""
    scorer = common.load_model(REWARD, trainable=False, task="SEQ_CLS")
    model = common.load_model(adapter.path).eval()
    own = trainable(model)
    reward = common.add_role(model, REWARD, "reward")
    critic = common.add_role(model, None, "critic", trainable=True)
    assert torch.equal(logits(model), adapter.logits)
    added = trainable(model) - own
    assert len(added) == 2 * LAYERS and all(".critic." in name for name in added)
    assert own < trainable(model)
    assert critic.weight.requires_grad and not reward.weight.requires_grad
    kept = trainable(model)
    for role, head in (("reward", reward), ("critic", critic)):
        with torch.no_grad(), common.using(model, role):
            hidden = common.causal_lm(model).base_model(input_ids=IDS).last_hidden_state
            scores = head(hidden)[:, -1]
        if role == "reward":
            torch.testing.assert_close(scores, logits(scorer), rtol=1e-5, atol=1e-5)
            assert scores.abs().max() > 0.01
        else:
            assert not scores.any()
        assert trainable(model) == kept and model.active_adapter == "default"
    with common.using(model, "critic"):  # its backward runs while its adapter is on
        hidden = common.causal_lm(model).base_model(input_ids=IDS).last_hidden_state
        hidden.sum().backward()
        assert not any(p.grad is not None for name, p in model.named_parameters()
                       if ".critic." not in name)
        assert all(p.grad is not None for name, p in model.named_parameters() if name in added)
    with common.reference(model):
        assert torch.equal(logits(model), adapter.logits)


def test_adapters_that_do_not_fit_are_refused(adapter, tmp_path, refused):
    """A reward model is no language model, nor the reverse; a role needs the policy's base."""
    assert "SEQ_CLS, needed is one for CAUSAL_LM" in refused(common.load_model, REWARD)
    line = refused(common.load_model, adapter.path, trainable=False, task="SEQ_CLS")
    assert adapter.path in line and "CAUSAL_LM, needed is one for SEQ_CLS" in line
    assert "not saved by reward_model.py" in refused(common.reward_config, adapter.path, TINY)
    assert "not saved by reward_model.py" in refused(common.reward_config, BASE, TINY)
    assert "one base has to carry both" in refused(common.reward_config, REWARD, BASE)
    assert common.reward_config(REWARD, adapter.path).task_type == "CAUSAL_LM"


@pytest.mark.parametrize("change, words", [
    (lambda key, x: {} if "layers.3" in key else {key: x}, "does not hold the weights"),
    (lambda key, x: {key: x * torch.nan if "layers.3" in key else x}, "not finite numbers")])
def test_roles_whose_files_lack_weights_are_refused(change, words, tmp_path, refused):
    """peft leaves what a file lacks as it was drawn; neither that nor NaN scores anything."""
    shutil.copytree(REWARD, tmp_path / "reward")
    file = tmp_path / "reward/adapter_model.safetensors"
    weights = {}
    for key, x in safetensors.torch.load_file(file).items():
        weights |= change(key, x)
    safetensors.torch.save_file(weights, file)
    model = common.load_model(TINY)
    line = refused(common.add_role, model, str(tmp_path / "reward"), "critic")
    assert re.search(words, line) and str(tmp_path / "reward") in line and "critic" in line


# ---- bad models ----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, extra", [
    ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8}), ("Cohere", {"logit_scale": 0.1}),
    ("Granite", {"logits_scaling": 4.0})])
def test_logits_that_change_in_an_unknown_way_are_refused(kind, extra, monkeypatch):
    """Known caps and scales are followed; others would be scored as what they are not."""
    shape = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                 num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5,
                 pad_token_id=0, bos_token_id=1, eos_token_id=2)
    neutral = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
    config = getattr(transformers, kind + "Config")
    model = getattr(transformers, kind + "ForCausalLM")
    torch.manual_seed(0)
    same = {name: neutral.get(name, value) for name, value in extra.items()}
    common.check_forward(model(config(**shape, **same)), "CAUSAL_LM")
    changed = model(config(**shape, **extra))
    common.check_forward(changed, "CAUSAL_LM")
    head = changed.get_output_embeddings()
    monkeypatch.setattr(common, "read_out", lambda causal, hidden: head(hidden))
    with pytest.raises(ValueError, match=f"{kind}ForCausalLM changes its logits"):
        common.check_forward(changed, "CAUSAL_LM")


def spoil(folder, breakage):
    """Breaks a copy of a model folder in one of the ways in which users meet it."""
    config = folder / "adapter_config.json"
    if breakage == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif breakage == "config":
        (folder / "config.json").write_text("{not json")
        (folder / "tokenizer.json").write_text("{not json")
    elif breakage == "adapter config":
        config.write_text("{not json")
    elif breakage == "weights":
        (folder / "model.safetensors").write_bytes(b"broken")
    elif breakage == "base gone":
        config.write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM",
                                      "base_model_name_or_path": "gone/model"}))
    elif breakage == "rank":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 5}))
    elif breakage == "nan":
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        weights["model.norm.weight"][0] = torch.nan
        safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    elif breakage == "another base":
        other = transformers.Qwen2Config(
            vocab_size=369, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1)
        transformers.Qwen2ForCausalLM(other).save_pretrained(folder / "other")
        base = {"base_model_name_or_path": str(folder / "other")}
        config.write_text(json.dumps(json.loads(config.read_text()) | base))


BROKEN = ["empty", "config", "adapter config", "weights", "base gone", "rank", "nan",
          "another base"]


@pytest.mark.parametrize("breakage", BROKEN)
def test_a_broken_model_ends_in_one_line(breakage, adapter, tmp_path, monkeypatch, refused):
    """With the phase, the name of the thing and the cause, whatever the libraries raise."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "broken"
    of_adapter = breakage in ("rank", "another base")
    shutil.copytree(adapter.path if of_adapter else TINY, folder)
    spoil(folder, breakage)
    assert f"loading the model {folder}: " in refused(common.load_model, str(folder))
    if breakage in ("empty", "config", "base gone"):
        line = refused(common.load_tokenizer, str(folder))
        assert f"loading the tokenizer of {folder}: " in line


@pytest.mark.parametrize("load", [common.load_model, common.load_tokenizer])
def test_an_unknown_model_ends_in_one_line(load, monkeypatch, refused):
    """A name that is no folder and that the Hub does not give."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "no-such-org/no-such-model" in refused(load, "no-such-org/no-such-model")


# ---- errors and flags ----------------------------------------------------------------------------

@pytest.mark.parametrize("error, words", [
    (KeyError("x"), "KeyError: 'x'"), (SystemExit(0), "SystemExit: 0"),
    (ValueError("a\nb\x1b[2J"), "ValueError: a b\\x1b[2J"), (RuntimeError("x" * 999), "xxxx"),
])
def test_a_phase_turns_what_is_raised_into_one_line(error, words, refused):
    """Of the phase and the cause; also sys.exit(0) of a user's reward ends with exit code 2."""
    def work():
        with common.phase("doing this"):
            raise error

    line = refused(work)
    assert line.startswith("error: doing this: ") and words in line and len(line) < 520


@pytest.mark.parametrize("error, words", [
    (KeyboardInterrupt(), "interrupted; the same command resumes an interrupted run"),
    (torch.OutOfMemoryError("CUDA"), "lower --micro-batch-size"),
    (MemoryError(), "lower --micro-batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "lower --micro-batch-size"),
    (OSError(28, "No space left on device"), "disk is full"),
    (OSError(122, "Disk quota exceeded"), "disk is full"),
    (RuntimeError("[enforce fail at inline_container.cc:664]"), "disk is full"),
    (BrokenPipeError(32, "Broken pipe"), "the same command resumes"),
])
def test_what_a_user_can_mend_ends_a_run_in_one_line(error, words, refused, monkeypatch):
    """Around a whole run; out of memory inside a phase is still out of memory."""
    monkeypatch.setattr(os, "dup2", lambda *_: None)

    def run():
        with common.running("--micro-batch-size"):
            if isinstance(error, torch.OutOfMemoryError):
                with common.phase("loading"):
                    raise error
            raise error

    assert words in refused(run)


def test_a_defect_of_the_program_is_not_hidden():
    """What no user can mend keeps its traceback."""
    with pytest.raises(ZeroDivisionError), common.running("--micro-batch-size"):
        print(1 / 0)


def test_where_all_processes_fail_the_first_speaks(monkeypatch, refused):
    """The others wait until torchrun ends them."""
    waited = []
    monkeypatch.setattr(common.time, "sleep", waited.append)
    refused(common.fail, "x")
    assert sum(waited) == 0
    monkeypatch.setattr(common, "RANK", 1)
    refused(common.fail, "x")
    assert sum(waited) >= 1


def test_an_error_is_not_glued_to_a_progress_bar(capsys):
    """The line stands at the start of a line."""
    bar = common.tqdm(total=9, file=sys.stderr)
    bar.update(3)
    with pytest.raises(SystemExit):
        common.fail("some cause")
    assert "error: some cause" in capsys.readouterr().err.split("\n")


def test_text_from_data_cannot_move_the_cursor():
    """Control and direction characters are spelled out, letters of all scripts stay."""
    assert common.visible("\xe9\u4f60 a\nb") == "\xe9\u4f60 a\nb"
    assert common.visible("\x1b[2J\r\u202e\x00") == "\\x1b[2J\\r\\u202e\\x00"


@pytest.mark.parametrize("kind, good, bad", [
    (common.count, ["1", "64"], ["0", "-1", "1.5", "nan", "x", "", "99999999999"]),
    (common.natural, ["0", "3"], ["-1", "0.5"]),
    (common.positive, ["0.1", "1e-8"], ["0", "-1", "nan", "inf", "-inf", "x"]),
    (common.weight, ["0", "0.5"], ["-0.1", "nan", "inf"]),
    (common.share, ["0", "0.5", "1"], ["1.01", "-0.1", "nan"]),
    (common.number(int, 4, 9), ["4", "9"], ["3", "10"]),
])
def test_flags_are_refused_out_of_their_range(kind, good, bad, monkeypatch, refused):
    """NaN and infinity too, in one line that names the flag; the borders are within."""
    for text in good + bad:
        flags = argparse.ArgumentParser()
        flags.add_argument("--model", default=TINY)
        flags.add_argument("--dataset", default="some/data")
        flags.add_argument("--size", type=kind)
        flags.add_argument("--output-dir", default="none")
        monkeypatch.setattr(sys, "argv", ["x.py", f"--size={text}"])
        if text in good:
            assert common.parse(flags, {"dataset": "tiny/x"}).size == float(text)
        else:
            assert "--size" in refused(common.parse, flags, {"dataset": "tiny/x"})


@pytest.mark.parametrize("argv, expected", [
    ([], ("tiny/x", "tiny/held", 2.0)),  # the tiny model's own
    (["--beta", "0.3"], ("tiny/x", "tiny/held", 0.3)),  # what a user says goes first
    (["--dataset", "mine"], ("mine", None, 2.0)),  # held-out rows go with their own data
    (["--dataset", "mine", "--eval-dataset", "e"], ("mine", "e", 2.0)),
    (["--loss", "b"], ("tiny/x", "tiny/held", 2.0)),
    (["--model", "other/model"], ("some/data", None, 0.1)),
    (["--model", "other/model", "--loss", "b"], ("some/data", None, 5.0)),
    (["--model", "other/model", "--loss", "b", "--beta", "1"], ("some/data", None, 1.0)),
])
def test_defaults_go_by_model_and_loss(argv, expected, monkeypatch):
    """Flags, then the tiny model's needs, then those of the loss, then the general default."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    flags = argparse.ArgumentParser()
    for name, default in (("model", TINY), ("dataset", "some/data"), ("eval-dataset", None),
                          ("output-dir", "none")):
        flags.add_argument("--" + name, default=default)
    flags.add_argument("--loss", choices=["a", "b"], default="a")
    flags.add_argument("--beta", type=float, default=0.1)
    monkeypatch.setattr(sys, "argv", ["x.py", *argv])
    tiny = {"dataset": "tiny/x", "eval_dataset": "tiny/held", "beta": 2.0}
    args = common.parse(flags, tiny, {"b": {"beta": 5.0}})
    assert (args.dataset, args.eval_dataset, args.beta) == expected


@pytest.mark.parametrize("argv", [["--nonsense"], ["--loss", "c"], ["extra"]])
def test_unknown_flags_are_one_line(argv, monkeypatch, refused):
    """As argparse words it, with exit code 2 and no usage before it."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--model", default=TINY)
    flags.add_argument("--loss", choices=["a", "b"], default="a")
    monkeypatch.setattr(sys, "argv", ["x.py", *argv])
    assert argv[-1] in refused(common.parse, flags, {"dataset": "tiny/x"})


# ---- a base model --------------------------------------------------------------------------------

@pytest.mark.parametrize("handled", [True, False])
def test_a_tuned_base_learns_to_stop(handled):
    """LoRA below a frozen head teaches a base to end answers in eos, never in <|im_end|>."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    if handled:
        tokenizer = common.load_tokenizer(BASE)
    torch.manual_seed(0)
    model = common.load_model(BASE)
    rows = (ROOT / "tiny/data/sft_train.jsonl").read_text().splitlines()[:12]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    examples = []
    for row in rows:
        (example,) = encoded(tokenizer, [], json.loads(row)["messages"])
        examples.append(example[0][0] + example[1][0])
    ids = torch.nn.utils.rnn.pad_sequence(
        list(map(torch.tensor, examples)), batch_first=True, padding_value=-100)
    stops = torch.tensor([len(example) - 1 for example in examples])
    rows = torch.arange(len(examples))
    for _ in range(20):
        logps = model(input_ids=ids.clamp(0)).logits[:, :-1].log_softmax(-1)
        loss = torch.nn.functional.nll_loss(logps.transpose(1, 2), ids[:, 1:], ignore_index=-100)
        stop = logps[rows, stops - 1, ids[rows, stops]].exp().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert stop > 0.8 if handled else stop < 0.1
