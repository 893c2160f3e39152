"""Loading: which weights are trained or frozen, and the roles of adapters; errors and flags."""
import argparse
import json
import shutil
import sys
from types import SimpleNamespace

import bitsandbytes
import huggingface_hub
import peft
import pytest
import safetensors.torch
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from conftest import ROOT
from transformers.integrations import sdpa_attention

import common

TINY, BASE, REWARD = (str(ROOT / "tiny" / name) for name in ("chat", "base", "reward"))
IDS = torch.tensor([[5, 9, 17, 33, 80, 12, 7, 101], [3, 44, 21, 8, 60, 61, 62, 63]])
LAYERS = 5 * 7  # linear layers of the tiny model: seven in each of its five blocks


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def train(model, steps=2):
    """Takes a few optimizer steps on all parameters that require gradients."""
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
    """A trained adapter on the tiny model, and its logits when it was saved."""
    torch.manual_seed(1)
    model = train(common.load_model(TINY, lora_rank=4)).eval()
    path = save(model, tmp_path_factory.mktemp("adapter"))
    return SimpleNamespace(path=path, logits=logits(model))


# ---- number formats and machines -----------------------------------------------------------------

def test_dtype_goes_by_compute_capability(monkeypatch):
    """A T4 gets fp16, although torch says that it supports bf16; Ampere gets bf16, a CPU fp32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    for capability, dtype in ((7, 5), torch.float16), ((8, 0), torch.bfloat16):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        assert common.choose_dtype(torch.device("cuda", 0)) == dtype
    assert common.choose_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("dtype, scales", [
    (torch.float32, False), (torch.bfloat16, False), (torch.float16, True)])
def test_gradients_are_scaled_in_fp16_only(monkeypatch, dtype, scales):
    """On a CPU, forward passes stay in fp32."""
    model = SimpleNamespace(device=torch.device("cpu"))
    with common.autocast(model):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    monkeypatch.setattr(common, "choose_dtype", lambda device: dtype)
    scaler = common.grad_scaler(model)
    assert scaler.is_enabled() == scales and (scaler.get_scale() > 1) == scales


def test_attention_below_ampere_repeats_keys_itself(monkeypatch):
    """In fp16, transformers must not set enable_gqa, which makes SDPA use its slow kernel there."""
    for dtype, patched in (torch.bfloat16, False), (torch.float32, False), (torch.float16, True):
        monkeypatch.setattr(common, "choose_dtype", lambda device, dtype=dtype: dtype)
        monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *args, **kwargs: "its own")
        common.load_model(TINY, trainable=False)
        asks = sdpa_attention.use_gqa_in_sdpa(None, None)
        assert asks == (False if patched else "its own"), f"{dtype}: enable_gqa is {asks}"


def test_each_process_has_the_gpu_of_its_local_rank(monkeypatch):
    """LOCAL_RANK numbers the processes of one machine, and RANK those of all machines."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setenv("RANK", "9")
    for local_rank, expected in ("1", 1), (None, 0):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local_rank:
            monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert common.choose_device() == torch.device("cuda", expected)


# ---- what is loaded and trained ------------------------------------------------------------------

@pytest.mark.parametrize("bits", ["on", "off"])
def test_lora_is_on_all_linear_layers_except_the_head(bits, base_logits):
    """It has the requested rank, is in fp32, is all that is trained, and changes no logits yet."""
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
    """Steps change only LoRA; training and evaluation passes alternate; the model can generate."""
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
    """Its logits are those of the full model with NF4's dequantized weights."""
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
    """Rank 0 trains all weights of a full model in fp32; trainable=False trains none."""
    used = common.load_model(TINY, trainable=False)
    assert not used.training and not trainable(used) and not isinstance(used, peft.PeftModel)
    full = common.load_model(TINY, load_in_4bit="on", lora_rank=0)
    assert full.training and {p.dtype for p in full.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in full.parameters())
    assert torch.equal(logits(full.eval()), base_logits)
    assert "--lora-rank 0" in refused(common.load_model, adapter.path, lora_rank=0)


def test_no_dropout_is_left(adapter, tmp_path):
    """Even with an adapter that had dropout, training mode gives the logits of evaluation."""
    shutil.copytree(adapter.path, tmp_path / "dropout")
    config = tmp_path / "dropout/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_dropout": 0.5}))
    model = common.load_model(str(tmp_path / "dropout"))
    assert model.training
    torch.testing.assert_close(model(IDS).logits, adapter.logits, rtol=0, atol=0)
    with common.reference(model):
        torch.testing.assert_close(model(IDS).logits, adapter.logits, rtol=0, atol=0)


def test_is_tiny(adapter, tmp_path, monkeypatch):
    """True for the embedded models and those trained from them, from any folder; else false."""
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
def test_the_reference_is_the_start_and_never_changes(start, adapter, base_logits):
    """Bit for bit, before and after training. Afterward, the policy is active and trained again."""
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


def test_an_exception_inside_another_role_puts_the_policy_back(adapter):
    """For example, when a user interrupts a cell of a notebook."""
    model = common.load_model(adapter.path)
    own = trainable(model)
    for role in common.reference(model), common.using(model, None):
        with pytest.raises(KeyboardInterrupt), role:
            raise KeyboardInterrupt
        assert model.active_adapter == "default" and trainable(model) == own
        assert torch.equal(logits(model.eval()), adapter.logits)


# ---- what is saved, and other roles --------------------------------------------------------------

def test_a_reward_model_in_4_bits_saves_and_loads(tmp_path):
    """A scalar head is trained with LoRA, in fp32; loaded again, it gives the same scores."""
    torch.manual_seed(0)
    model = common.load_model(TINY, load_in_4bit="on", lora_rank=4, task="SEQ_CLS")
    name, = (name for name in trainable(model) if "lora_" not in name)
    head = model.get_parameter(name)
    assert "score.modules_to_save.default" in name and head.dtype == torch.float32
    old, before = head.detach().clone(), logits(model.eval())
    after = logits(train(model).eval())
    assert before.shape == (2, 1)
    assert not torch.equal(before, after) and not torch.equal(head, old)
    path = save(model, tmp_path / "rm")
    for kind in (False, True):
        again = common.load_model(path, "on", trainable=kind, task="SEQ_CLS").eval()
        torch.testing.assert_close(logits(again), after, rtol=1e-6, atol=1e-6)
        assert len(trainable(again)) == (1 + 2 * LAYERS if kind else 0)


def test_a_reward_model_takes_over_a_causal_adapter(adapter):
    """Started from a language model's adapter, it has the hidden states of that model."""
    model = common.load_model(adapter.path, task="SEQ_CLS").eval()
    causal = common.load_model(adapter.path, trainable=False)
    hidden = [common.causal_lm(m).base_model(input_ids=IDS).last_hidden_state
              for m in (model, causal)]
    assert torch.equal(*hidden)


def test_roles_share_a_base_and_leave_each_other_alone(adapter):
    """The reward has the reward model's scores, the critic starts at 0, the policy is unchanged."""
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
    """A reward model is not a language model, nor the reverse; a role needs the policy's base."""
    assert "an adapter for SEQ_CLS, not for CAUSAL_LM" in refused(common.load_model, REWARD)
    line = refused(common.load_model, adapter.path, trainable=False, task="SEQ_CLS")
    assert adapter.path in line and "for CAUSAL_LM, not for SEQ_CLS" in line
    assert "not saved by reward_model.py" in refused(common.reward_config, adapter.path, TINY)
    assert "not saved by reward_model.py" in refused(common.reward_config, BASE, TINY)
    assert "must share one base" in refused(common.reward_config, REWARD, BASE)
    assert common.reward_config(REWARD, adapter.path).task_type == "CAUSAL_LM"


def test_a_role_whose_file_lacks_weights_is_refused(tmp_path, refused):
    """peft would leave the missing weights random, so the scores would be meaningless."""
    shutil.copytree(REWARD, tmp_path / "reward")
    file = tmp_path / "reward/adapter_model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({k: x for k, x in weights.items() if "layers.3" not in k}, file)
    line = refused(common.add_role, common.load_model(TINY), str(tmp_path / "reward"), "critic")
    assert "its file lacks weights" in line and str(tmp_path / "reward") in line


# ---- what is reported ----------------------------------------------------------------------------

def test_settings_are_printed_in_words(capsys):
    """The total counts the parameters of the base."""
    model = common.load_model(TINY, load_in_4bit="off", lora_rank=16)
    common.print_settings(model)
    parts = [p for name, p in model.named_parameters() if "lora_" not in name]
    millions = sum(p.numel() for p in parts) / 1e6
    words = capsys.readouterr().out.splitlines()
    assert words[0] == "device: cpu, number format: float32"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert words[1] == (f"trainable parameters: {trained:,} of {millions:.1f} million "
                        f"({trained / millions / 1e6:.2%})")
    common.print_settings(common.load_model(TINY, load_in_4bit="on"))
    assert "weights of the base in 4 bits: " in capsys.readouterr().out


def test_a_model_card_says_how_a_model_was_made(tmp_path, monkeypatch):
    """It replaces PEFT's template; the license is that of the base, if its card names one."""
    shutil.copytree(TINY, tmp_path / "base")
    model = str(tmp_path / "base")
    monkeypatch.setattr(sys, "argv", ["/some/dpo.py", "--model", "my base", "--seed", "1"])
    summary = {"method": "dpo", "model": model, "dataset": "a\x1b[2J.jsonl", "step": 7,
               "before": {"loss": 0.5}, "after": {"loss": 0.25}}
    for name in "unknown", "apache-2.0":
        (tmp_path / "README.md").write_text("# Model Card for Model ID")
        common.write_card(tmp_path, summary)
        text = (tmp_path / "README.md").read_text()
        card = huggingface_hub.ModelCard(text)
        assert card.data.base_model == model and card.data.tags == ["dpo"]
        assert card.data.license == (None if name == "unknown" else name)
        for part in (f"(license: {name})", "`a\\x1b[2J.jsonl`, 7 optimizer steps",
                     "`python dpo.py --model 'my base' --seed 1`", f"peft {peft.__version__}",
                     "| loss | 0.5 | 0.25 |"):
            assert part in text
        (tmp_path / "base/README.md").write_text("---\nlicense: apache-2.0\n{\n---\n")


# ---- errors and flags ----------------------------------------------------------------------------

@pytest.mark.parametrize("error, words", [
    (KeyError("x"), "KeyError: 'x'"), (SystemExit(0), "SystemExit: 0"),
    (ValueError("a\nb\x1b[2J"), "ValueError: a b\\x1b[2J"), (RuntimeError("x" * 999), "xxxx"),
])
def test_a_phase_turns_what_is_raised_into_one_line(error, words, refused):
    """It names the phase and the cause; even sys.exit(0) in a user's reward gives exit code 2."""
    def work():
        with common.phase("doing this"):
            raise error

    line = refused(work)
    assert line.startswith("error: doing this: ") and words in line and len(line) < 520


def test_if_all_processes_fail_the_first_speaks(monkeypatch, refused):
    """The others wait until torchrun stops them."""
    waited = []
    monkeypatch.setattr(common.time, "sleep", waited.append)
    refused(common.fail, "x")
    assert sum(waited) == 0
    monkeypatch.setattr(common, "RANK", 1)
    refused(common.fail, "x")
    assert sum(waited) >= 1


def test_an_error_is_not_glued_to_a_progress_bar(capsys):
    """The message starts on a new line."""
    bar = common.tqdm(total=9, file=sys.stderr)
    bar.update(3)
    with pytest.raises(SystemExit):
        common.fail("some cause")
    assert "error: some cause" in capsys.readouterr().err.split("\n")


def test_a_misspelled_name_in_a_script_is_not_turned_into_a_line():
    """Its traceback shows the line."""
    with pytest.raises(NameError), common.phase("doing this"):
        undefined_name  # noqa: B018, F821


def test_text_from_data_cannot_move_the_cursor():
    """Control and direction characters are escaped; letters of all scripts stay."""
    assert common.visible("\xe9\u4f60 a\nb") == "\xe9\u4f60 a\nb"
    assert common.visible("\x1b[2J\r\u202e\x00") == "\\x1b[2J\\r\\u202e\\x00"


@pytest.mark.parametrize("argv, expected", [
    ([], ("tiny/x", "tiny/held", 2.0)),  # the tiny model's own defaults
    (["--beta", "0.3"], ("tiny/x", "tiny/held", 0.3)),  # a flag takes precedence
    (["--dataset", "mine"], ("mine", None, 2.0)),  # held-out rows go with their own data
    (["--dataset", "mine", "--eval-dataset", "e"], ("mine", "e", 2.0)),
    (["--loss", "b"], ("tiny/x", "tiny/held", 2.0)),
    (["--model", "other/model"], ("some/data", None, 0.1)),
    (["--model", "other/model", "--loss", "b"], ("some/data", None, 5.0)),
    (["--model", "other/model", "--loss", "b", "--beta", "1"], ("some/data", None, 1.0)),
])
def test_defaults_go_by_model_and_loss(argv, expected, monkeypatch):
    """In this order: flags, defaults of the tiny model, of the loss, of the parser."""
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
