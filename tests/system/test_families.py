"""Model families: training and sampling use the log-probs that the model itself computes.

Each family is a small random model, loaded as every script loads it, with LoRA matrices that are
not zero. The naive computation reads each row alone, in evaluation mode, without a cache.
"""
import json
import re
import shutil
from argparse import Namespace

import peft
import pytest
import tokenizers
import torch
import transformers
from conftest import drawn_logps
from transformers.integrations import sdpa_attention

import common
import grpo
import pairs
import reward_model

SIZES = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
             initializer_range=0.4, bos_token_id=None, eos_token_id=None, pad_token_id=None)
SLIDING = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=4,
              linear_value_head_dim=4, layer_types=["linear_attention", "full_attention"])
CAPPED = SLIDING | {"final_logit_softcapping": 2.0}
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
# Dropout that is not an nn.Dropout module, for the families whose config has such a field.
DROPOUT = {"attention_dropout": 0.3}
FAMILIES = {
    "qwen3": transformers.Qwen3Config(**SIZES | DROPOUT),
    "qwen3.5": transformers.Qwen3_5TextConfig(**SIZES | DROPOUT | LINEAR),
    "lfm2": transformers.Lfm2Config(**SIZES | {"layer_types": ["conv", "full_attention"]}),
    "gemma2": transformers.Gemma2Config(**SIZES | DROPOUT | CAPPED),
    "gemma3": transformers.Gemma3TextConfig(**SIZES | DROPOUT | SLIDING),
    "gemma4": transformers.Gemma4TextConfig(
        **SIZES | CAPPED | {"global_head_dim": 4, "num_global_key_value_heads": 2,
                            "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 48,
                            "num_hidden_layers": 4, "num_kv_shared_layers": 2,
                            "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "smollm3": transformers.SmolLM3Config(**SIZES | DROPOUT | {"no_rope_layers": [1, 0]}),
    "llama3": transformers.LlamaConfig(**SIZES | DROPOUT | {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
    "granite": transformers.GraniteConfig(**SIZES | DROPOUT | {"logits_scaling": 3.0}),
    "opt": transformers.OPTConfig(
        vocab_size=48, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.4, dropout=0.3,
        bos_token_id=None, eos_token_id=None, pad_token_id=None),
    "gpt_oss": transformers.GptOssConfig(**SIZES | DROPOUT | SLIDING | EXPERTS),
    "mixtral": transformers.MixtralConfig(**SIZES | DROPOUT | EXPERTS | {
        "router_jitter_noise": 0.3})}
ROWS = [[5, 9, 17, 33, 21, 12, 7, 40, 3, 44, 2], [3, 44, 21, 8, 30], [9, 10, 11, 12, 13, 14, 15]]


def make_tokenizer():
    """A token for each number below 48."""
    model = tokenizers.models.WordLevel({str(i): i for i in range(48)}, unk_token="0")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), eos_token="47", pad_token="0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saves a random model of a family once, and returns its folder."""
    made = {}

    def folder(name):
        if name not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name])
            made[name] = str(tmp_path_factory.mktemp("family"))
            model.save_pretrained(made[name])
            make_tokenizer().save_pretrained(made[name])
        return made[name]

    return folder


def with_adapter(folder, **options):
    """Loads a model as for training, then fills the LoRA matrices B, which are zero at first."""
    torch.manual_seed(0)
    model = common.load_model(folder, load_in_4bit="off", lora_rank=4, **options)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def naive_logps(model, row):
    """log p(token t+1 | tokens ≤ t) of a row, from a plain forward pass of the row alone."""
    logits = common.causal_lm(model)(input_ids=torch.tensor([row]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_and_gradients_are_those_of_a_plain_forward_pass(name, folders):
    """In training mode with gradient checkpointing, beside rows of other lengths."""
    model = with_adapter(folders(name), gradient_checkpointing="on")
    batch = dict(make_tokenizer().pad({"input_ids": ROWS}, return_tensors="pt"))
    batch["loss_mask"] = batch["attention_mask"].clone()
    batch["loss_mask"][:, :2] = 0
    weights = [p for p in model.parameters() if p.requires_grad]
    factors = torch.randn(3, batch["input_ids"].shape[1] - 1)
    ours = grpo.token_logps(model, batch)
    our_gradients = torch.autograd.grad((ours * factors).sum(), weights)
    model.eval()
    total = 0
    for i, row in enumerate(ROWS):
        plain = naive_logps(model, row)
        torch.testing.assert_close(ours[i, 1:len(row) - 1], plain[1:], rtol=1e-4, atol=1e-4)
        assert not ours[i, len(row) - 1:].any() and ours[i, 0] == 0
        total = total + (plain[1:] * factors[i, 1:len(row) - 1]).sum()
    assert ours.std() > 0.5  # the weights are large enough to reveal a mistake
    for mine, theirs in zip(our_gradients, torch.autograd.grad(total, weights), strict=True):
        assert mine.any(), "a LoRA matrix without a gradient should not have been created"
        assert (mine - theirs).norm() <= 1e-3 * theirs.norm() + 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_sampled_log_probs_are_those_that_are_scored(name, folders, draws):
    """With prompts of two lengths, left padding, several copies, and rows that leave the batch."""
    model, tokenizer = with_adapter(folders(name)), make_tokenizer()
    model.generation_config.eos_token_id = list(range(40, 48))
    args = Namespace(max_new_tokens=10, temperature=1.0)
    answers = grpo.sample(model, tokenizer, [ROWS[0][:7], ROWS[1][:3]], 4, args, 0)
    assert len({len(answer) for answer in answers}) > 2
    prompts = [ROWS[0][:7]] * 4 + [ROWS[1][:3]] * 4
    with torch.no_grad():
        scored = grpo.token_logps(model, grpo.join_answers(prompts, answers, tokenizer, model))
        model.eval()
        drawn = drawn_logps(draws, answers)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            plain = naive_logps(model, prompt + answer)[len(prompt) - 1:]
            ours = scored[i, len(prompt) - 1:len(prompt) - 1 + len(answer)]
            torch.testing.assert_close(drawn[i].float(), plain, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_a_judge_reads_the_models_own_logits(name, folders):
    """The softmax over the logits of two verdicts depends on soft-capping and scaling."""
    model = common.load_model(folders(name), "off", trainable=False)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ROWS[0]])).logits[0, -1, [7, 30]]
    (chance,) = pairs.first_wins(model, make_tokenizer(), [(ROWS[0], (7, 30))])
    assert chance == pytest.approx(logits.softmax(-1)[0].item(), abs=1e-5)


# ---- what is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("config, words", [
    (transformers.HyperCLOVAXConfig(**SIZES | {"logits_scaling": 3.0}),
     "HyperCLOVAXForCausalLM changes its logits after the head"),
    (transformers.BartConfig(
        vocab_size=48, d_model=16, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=24,
        encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=24, init_std=0.4,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=2, eos_token_id=3,
        decoder_start_token_id=3, forced_eos_token_id=None), "does not continue from its cache")])
def test_a_model_that_would_be_read_wrongly_is_refused(config, words, tmp_path, refused):
    """HyperCLOVA X multiplies by a scale, Granite divides; Bart counts left padding as text."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert words in refused(common.load_model, str(tmp_path))


def test_a_cache_that_is_not_read_is_refused(folders, monkeypatch, refused):
    """As if a later transformers renamed the argument and silently ignored the old name."""
    forward = transformers.Qwen3ForCausalLM.forward

    def forgets(self, *args, **kwargs):
        kwargs[common.CACHE] = None
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "forward", forgets)
    assert "does not continue from its cache" in refused(common.load_model, folders("qwen3"))


def test_dropout_that_is_left_is_refused(folders, monkeypatch, refused):
    """With dropout, policy, reference and sampler would disagree on log-probs."""
    monkeypatch.setattr(common, "load_config", lambda name: transformers.AutoConfig.from_pretrained(
        common.base_of(name)))
    assert "reads rows differently in training" in refused(
        common.load_model, folders("opt"))


@pytest.mark.parametrize("kind", [
    peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)])
def test_adapters_other_than_lora_are_refused(kind, folders, tmp_path, refused):
    """Before any model is loaded."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folders("qwen3"))
    peft.get_peft_model(base, kind).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for load in common.is_tiny, common.load_tokenizer, common.load_model:
        assert "only LoRA is supported" in refused(load, str(tmp_path))


def test_code_in_a_model_folder_does_not_run(folders, tmp_path, monkeypatch, refused):
    """Even if standard input answers yes to a prompt."""
    folder, trace = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(folders("qwen3"), folder)
    config = json.loads((folder / "config.json").read_text())
    mapped = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M",
              "AutoTokenizer": ["evil.T", None]}
    config |= {"model_type": "mine", "auto_map": mapped}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    for load in common.load_model, common.load_tokenizer:
        assert str(folder) in refused(load, str(folder))
    assert not trace.exists()


# ---- what is chosen for a model ------------------------------------------------------------------

def test_every_kind_of_dropout_is_off_in_the_config(tmp_path):
    """Also in sub-configs; other numbers stay as they are."""
    transformers.Gemma3Config(text_config=SIZES | DROPOUT | SLIDING,
                              vision_config={"attention_dropout": 0.2}).save_pretrained(tmp_path)
    loaded = common.load_config(str(tmp_path))
    assert loaded.text_config.attention_dropout == loaded.vision_config.attention_dropout == 0
    FAMILIES["mixtral"].save_pretrained(tmp_path)
    loaded = common.load_config(str(tmp_path))
    assert loaded.attention_dropout == loaded.router_jitter_noise == 0 != loaded.rms_norm_eps


def test_attention_is_chosen_by_the_class_and_never_eager_on_qwen(folders, tmp_path):
    """Gemma 2 supports only eager attention; on Qwen, eager attention overflows in fp16."""
    chosen = {}
    for name in "gemma2", "qwen3":
        folder = tmp_path / name
        shutil.copytree(folders(name), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "eager"}))
        model = common.load_model(str(folder), trainable=False)
        chosen[name] = model.config._attn_implementation
    assert chosen == {"gemma2": "eager", "qwen3": "sdpa"}


@pytest.mark.parametrize("name, warned", [("gemma3", True), ("gemma4", True), ("gemma2", False)])
def test_a_warning_names_gemma_3_and_4_in_fp16(name, warned, folders, monkeypatch, capsys):
    """As on a T4, which has no bf16."""
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *args, **kwargs: False)
    monkeypatch.setattr(common, "choose_dtype", lambda device: torch.float16)
    common.load_model(folders(name), "off", trainable=False)
    assert ("overflows in fp16" in capsys.readouterr().out) == warned


def test_settings_say_how_much_is_in_4_bits(folders):
    """The experts of a mixture-of-experts model are not nn.Linear layers, and stay in 16 bits."""
    shares = {name: common.settings(common.load_model(folders(name), bits, lora_rank=4))
              ["share_in_4bit"] for name, bits in (
                  ("qwen3", "on"), ("mixtral", "on"), ("llama3", "off"))}
    assert shares["llama3"] == 0 < shares["mixtral"] < 0.3 < shares["qwen3"] < 1, shares


def lora_names(model, role="default"):
    return [key for key, _ in model.named_parameters() if f"lora_A.{role}" in key]


def test_lora_is_on_the_linear_layers_that_text_passes_through(folders, tmp_path):
    """Not on vision towers, routers, heads, Mamba's out_proj, or layers that reuse others' keys."""
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, image_size=8,
                  num_attention_heads=2, patch_size=4)
    config = transformers.Gemma3Config(
        text_config=SIZES | SLIDING, vision_config=vision, mm_tokens_per_image=4,
        image_token_index=47, boi_token_index=45, eoi_token_index=46)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma3")
    model = common.load_model(str(tmp_path / "gemma3"), lora_rank=2)
    # A policy that has a vision tower can have a critic.
    assert common.add_role(model, None, "critic", trainable=True).weight.shape == (1, 16)
    for role in "default", "critic":
        named = lora_names(model, role)
        assert len(named) == 14 and all("language_model" in key for key in named)
    assert not any("gate" in x for x in lora_names(common.load_model(folders("mixtral"))))
    mamba = transformers.BambaConfig(
        **SIZES | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 4,
                   "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4})
    transformers.AutoModelForCausalLM.from_config(mamba).save_pretrained(tmp_path / "bamba")
    named = lora_names(common.load_model(str(tmp_path / "bamba"), lora_rank=2))
    assert any("mamba.in_proj" in key for key in named)
    assert not any("out_proj" in key for key in named)
    # In this model, the last two layers reuse the keys and values of the first two.
    model = common.load_model(folders("gemma4"), lora_rank=2)
    assert not any(re.search(r"layers\.[23]\.self_attn\.[kv]_proj", x) for x in lora_names(model))
    common.save_model(model, make_tokenizer(), tmp_path / "adapter")
    for kept in True, False:
        model = common.load_model(str(tmp_path / "adapter"), keep_reference=kept)
        assert bool(lora_names(model, "reference")) == kept


# ---- reward models -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["gemma3", "gemma4", "lfm2"])
def test_a_reward_model_of_any_family_is_saved_and_read_again(name, folders, tmp_path):
    """Alone, to be trained further, and as a role; two lack a sequence-classification class."""
    tokenizer = make_tokenizer()
    model = common.load_model(folders(name), "off", lora_rank=4, task="SEQ_CLS")
    torch.manual_seed(1)
    for parameter in [p for p in model.parameters() if p.requires_grad]:
        torch.nn.init.normal_(parameter, std=0.3)
    batch = dict(tokenizer.pad({"input_ids": ROWS}, return_tensors="pt"))
    head = common.causal_lm(model).score
    assert [p.requires_grad for p in head.parameters()][-1]
    with torch.no_grad():
        rewards = reward_model.sequence_rewards(model, batch, head)
        assert rewards.std() > 0.1
        common.save_model(model, tokenizer, tmp_path)
        for trainable in False, True:
            again = common.load_model(str(tmp_path), "off", trainable=trainable, task="SEQ_CLS")
            found = reward_model.sequence_rewards(again, batch, common.causal_lm(again).score)
            torch.testing.assert_close(found, rewards, rtol=1e-4, atol=1e-4)
        policy = with_adapter(folders(name))
        role = common.add_role(policy, str(tmp_path), "reward")
        with common.using(policy, "reward"):
            found = reward_model.sequence_rewards(policy, batch, role)
        torch.testing.assert_close(found, rewards, rtol=1e-4, atol=1e-4)
