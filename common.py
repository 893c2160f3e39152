"""What every script shares: loading a model, and turning chats or strings into token ids with a loss mask.

Loading knows Hub names, local folders and saved LoRA adapters. It picks the number format for the hardware, quantises the
frozen base to 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314) and puts LoRA matrices (Hu et al. 2021, arXiv:2106.09685) on
all its linear layers. Encoding gives two lists of equal length: `input_ids`, and `loss_mask` with a 1 for each token that
the model should learn to produce. A row that cannot be encoded raises ValueError with the reason.
"""
import contextlib
import functools
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import recommends an optional CPU kernel
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft's use of it

import bitsandbytes  # noqa: E402
import huggingface_hub  # noqa: E402
import jinja2  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig, GenerationConfig,
)
from transformers.integrations import sdpa_attention  # noqa: E402

HERE = Path(__file__).resolve().parent
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
huggingface_hub.utils.logging.set_verbosity_error()  # without a network it reports every retry


def fail(message: str) -> NoReturn:
    """Ends the program over something that the user can mend: one line on stderr, exit code 2, no traceback."""
    clear = "\r\033[K" if sys.stderr.isatty() else ""  # of a progress bar
    print(f"{clear}error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


# ---- models -----------------------------------------------------------------------------------------------

def choose_device() -> torch.device:
    """The GPU of this process (torchrun sets LOCAL_RANK), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # bitsandbytes and nccl work on the current device
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(device: torch.device) -> torch.dtype:
    """fp32 on a CPU, bf16 if the GPU computes in it, fp16 on older ones: `torch.cuda.is_bf16_supported()` says True on a T4, which emulates it."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def find(name: str) -> str:
    """`name` itself, or the file or folder of that name beside this file: tiny/chat is found from any folder."""
    return str(HERE / name) if not Path(name).exists() and (HERE / name).exists() else name


def adapter_config(name: str) -> PeftConfig | None:
    """The config of a LoRA adapter, or None for a full model."""
    if Path(find(name)).is_dir() and not Path(find(name), "adapter_config.json").exists():
        return None
    try:
        return PeftConfig.from_pretrained(find(name))
    except ValueError:  # peft's answer if the Hub has no adapter_config.json there
        return None


def base_of(name: str) -> str:
    """Where the full model of `name` is: itself, or the base of an adapter."""
    adapter = adapter_config(name)
    return find(adapter.base_model_name_or_path if adapter else name)


@contextlib.contextmanager
def loading(name: str):
    """Turns what libraries raise for names, files and networks into one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        fail(f"the model {name!r} does not fit into the memory of the GPU: choose a smaller one, or --load-in-4bit on")
    except Exception as error:  # each library has types of its own
        what = "that folder holds no such model" if Path(find(name)).is_dir() else "there is no such folder, and the Hub did not give it"
        fail(f"cannot load the model {name!r}: {what} ({' '.join(str(error).split()):.200})")


def is_tiny(name: str) -> bool:
    """True for the embedded models and what was trained from them: they have data and learning rates of their own."""
    with loading(name):
        if not Path(find(name)).is_dir():
            return False
        run = Path(base_of(name), "summary.json")  # of a run that trained all weights
        return is_tiny(json.loads(run.read_text())["model"]) if run.exists() else run.resolve().is_relative_to(HERE / "tiny")


def load_model(name: str, load_in_4bit: str = "auto", lora_rank: int = 16, gradient_checkpointing: str = "auto", trainable: bool = True,
               task: str = "CAUSAL_LM"):
    """Loads a language model, or one with a scalar head instead of its own, with a LoRA adapter to train.

    name: a Hub name, a local folder, or a LoRA adapter, whose base is then loaded below it.
    load_in_4bit, gradient_checkpointing: "on", "off", or "auto", which is on for CUDA. 4 bits are NF4 with double quantisation, also on CPUs.
    lora_rank: of a new adapter on all linear layers but the head; 0 trains the full weights. An adapter given as `name` keeps its own.
    trainable: False loads the model as it is, to use it.
    task: "CAUSAL_LM", or "SEQ_CLS" for a reward model, whose scalar head `score` is saved with the adapter; it may start from either kind.

    The trainable adapter is "default", in fp32; all else is frozen. A start from an adapter is kept a second time, frozen, as "reference".
    Exits with code 2 if there is nothing to load.
    """
    device, full = choose_device(), trainable and lora_rank == 0
    dtype = torch.float32 if full else choose_dtype(device)  # in 16 bits, most of Adam's small steps would round to nothing
    quantise = load_in_4bit == "on" or load_in_4bit == "auto" and device.type == "cuda" and not full
    if device.type == "cpu":
        # on CPUs with AVX512-BF16 an eval forward would repack the 4-bit weights, and the next training forward fail
        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
        if is_tiny(name):  # matrices this small gain nothing from a second thread, and threads that wait for each other cost a lot
            torch.set_num_threads(1)
    elif torch.cuda.get_device_capability(device) < (8, 0):
        # before Ampere, SDPA runs enable_gqa in its slow math kernel; without it transformers repeats the keys itself
        sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    with loading(name):
        adapter = adapter_config(name)
        if full and (quantise or adapter):
            fail("--lora-rank 0 trains the full weights: it goes with no LoRA adapter as --model and not with --load-in-4bit on")
        auto, head = (AutoModelForCausalLM, {}) if task == "CAUSAL_LM" else (AutoModelForSequenceClassification, {"num_labels": 1})
        model = auto.from_pretrained(base_of(name), dtype=dtype, quantization_config=nf4 if quantise else None, device_map={"": device},
                                     attn_implementation="sdpa", **head)  # eager attention overflows in fp16 on Qwen
    # frozen by hand: peft's prepare_model_for_kbit_training would also turn embeddings and head into fp32, 2 GiB at 7B
    model.requires_grad_(full)
    if adapter and adapter.task_type != task and (task == "CAUSAL_LM" or not trainable):
        fail(f"{name} is an adapter for the task {adapter.task_type}; needed is one for {task}")
    if adapter and adapter.task_type == task:
        model = PeftModel.from_pretrained(model, find(name), is_trainable=trainable)
        if trainable and task == "CAUSAL_LM":
            model.load_adapter(find(name), "reference", is_trainable=False)
    elif trainable and not full:
        config = adapter or LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
        config.task_type, config.modules_to_save, config.inference_mode = task, ["score"] if task == "SEQ_CLS" else None, False
        model = get_peft_model(model, config)
        if adapter:  # a reward model that starts from a language model's adapter takes over its matrices
            score = {"base_model.model.score.weight": model.get_base_model().score.modules_to_save["default"].weight}
            set_peft_model_state_dict(model, load_peft_weights(find(name), device="cpu") | score)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # policy, reference and sampler must agree on a log-prob
            module.p = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:  # the GradScaler cannot unscale fp16 gradients
            parameter.data = parameter.data.float()
    if gradient_checkpointing == "on" or gradient_checkpointing == "auto" and device.type == "cuda":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if task == "CAUSAL_LM":
        check_head(model)
    return model.train(trainable)


def causal_lm(model):
    """The transformers model, with the LoRA layers that peft put inside it: `.base_model` is its backbone, then comes the head."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@torch.no_grad()
def check_head(model):
    """Refuses models whose logits are not `hidden @ head.T`, as all scripts compute them, but capped, scaled or shifted."""
    causal, input_ids = causal_lm(model).eval(), torch.arange(4, device=model.device)[None]
    logits = causal(input_ids=input_ids).logits.float()
    ours = (causal.base_model(input_ids=input_ids).last_hidden_state @ causal.get_output_embeddings().weight.T).float()
    if not torch.allclose(logits, ours, rtol=0, atol=0.01 * logits.abs().max().item()):
        fail(f"{type(causal).__name__} changes its logits after the head, which these scripts do not compute: choose another model")


@contextlib.contextmanager
def using(model, role: str | None):
    """Inside, `model` wears another adapter, or with None it is the bare base. peft switches requires_grad with the adapter: it is put back."""
    outer, flags = model.active_adapter, [(p, p.requires_grad) for p in model.parameters()]
    try:
        with contextlib.nullcontext() if role else model.disable_adapter():
            if role:
                model.set_adapter(role)
            for p, flag in flags:
                p.requires_grad_(flag)
            yield
    finally:
        model.set_adapter(outer)
        for p, flag in flags:
            p.requires_grad_(flag)


def reference(model):
    """A context in which `model` is the frozen model that training started from: the base, or a copy of the adapter it started from."""
    return using(model, "reference" if "reference" in model.peft_config else None)


def add_role(model, name: str | None, role: str, trainable: bool = False) -> torch.nn.Linear:
    """Puts one more adapter called `role` on `model` and returns the scalar head that goes with it: both from the reward model `name`, which
    reward_model.py saved on the same base (else exit code 2), or with None a new adapter and a head of zeros."""
    own, kept = model.peft_config["default"], [p for p in model.parameters() if p.requires_grad]
    score, weights = torch.zeros(1, causal_lm(model).config.hidden_size), {}
    config = LoraConfig(r=own.r, lora_alpha=own.lora_alpha, target_modules=own.target_modules)
    if name is not None:
        with loading(name):
            config, weights = adapter_config(name), load_peft_weights(find(name), device="cpu")
        if config.task_type != "SEQ_CLS" or "base_model.model.score.weight" not in weights:
            fail(f"{name} is no reward model that reward_model.py saved")
        if Path(base_of(name)).resolve() != Path(find(own.base_model_name_or_path)).resolve():
            fail(f"the reward model {name} has the base {base_of(name)}, the policy {own.base_model_name_or_path}: one base has to carry both")
        score = weights.pop("base_model.model.score.weight")
    config.task_type, config.modules_to_save = "CAUSAL_LM", None
    model.add_adapter(role, config)
    if weights:
        set_peft_model_state_dict(model, weights, adapter_name=role)
    model.requires_grad_(False)
    for parameter in kept + [p for n, p in model.named_parameters() if trainable and f".{role}." in n]:
        parameter.requires_grad_(True).data = parameter.data.float()
    head = torch.nn.Linear(score.shape[1], 1, bias=False, device=causal_lm(model).device).requires_grad_(trainable)
    head.weight.data.copy_(score)
    return head


def describe(model) -> dict:
    """What was chosen for this model on this machine, for the screen and summary.json."""
    causal = causal_lm(model)
    return {
        "device": torch.cuda.get_device_name(causal.device) if causal.device.type == "cuda" else "cpu",
        "dtype": str(choose_dtype(causal.device)).removeprefix("torch."),
        "load_in_4bit": bool(getattr(causal, "is_loaded_in_4bit", False)),
        "gradient_checkpointing": causal.is_activation_checkpointing,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


# ---- tokens -----------------------------------------------------------------------------------------------

def load_tokenizer(name: str):
    """The tokenizer of a model or adapter, with a pad token, and with a chat template whose answers end in a token that the model knows.

    A published base model such as Qwen2.5-0.5B comes with a template that ends turns in <|im_end|>, a token it was never trained on. LoRA
    with a frozen head cannot make it say that; eos it does know. Where the end of turn is no stop token of the model, eos takes its place.
    """
    with loading(name):
        tokenizer, config = AutoTokenizer.from_pretrained(find(name)), AutoConfig.from_pretrained(base_of(name))
        try:
            generation_config = GenerationConfig.from_pretrained(base_of(name))
        except OSError:  # the file is optional
            generation_config = GenerationConfig.from_model_config(config)
    # many tokenizers name no limit, or a longer one than the model was trained for
    tokenizer.model_max_length = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or sys.maxsize)
    known = stop_token_ids(tokenizer, generation_config, template=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: masks come from lengths, never from `id != pad`
    end = end_of_turn_id(tokenizer)
    if end is not None and end not in known:
        end_token, ask = tokenizer.convert_ids_to_tokens(end), [{"role": "user", "content": "Q"}]
        header = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)[len(tokenizer.apply_chat_template(ask, tokenize=False)):]
        # rendered as before; then the first end-of-turn token after each assistant header is replaced
        tokenizer.chat_template = (
            f"{{%- set chat %}}{tokenizer.chat_template}{{%- endset %}}{{%- set header = {header!r} %}}{{%- for part in chat.split(header) %}}"
            f"{{{{ part if loop.first else header + part.replace({end_token!r}, {tokenizer.eos_token!r}, 1) }}}}{{%- endfor %}}")
        end_of_turn_id.cache_clear()
        print(f"{name} has no {end_token} among its stop tokens (a base model?): answers end with {tokenizer.eos_token} instead")
    return tokenizer


@functools.lru_cache
def end_of_turn_id(tokenizer) -> int | None:
    """The special token with which the chat template closes an assistant turn, None if there is none."""
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("ANSWER")[2]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def stop_token_ids(tokenizer, generation_config, template: bool = True) -> list[int]:
    """Every token that ends an answer: eos, what the generation config names, and the template's end of turn."""
    named = generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named]), end_of_turn_id(tokenizer) if template else None}
    return sorted(ids - {None})


def render(tokenizer, messages: list, add_generation_prompt: bool = False) -> list[int]:
    """The token ids of a conversation. ValueError if it is none, or none that the template takes."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation must be a list of messages, and not empty")
    follows = {"system": ("start",), "user": ("start", "system", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
    previous = "start"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"message {number} must be an object with the strings role and content")
        if previous not in follows.get(message["role"], ()):
            raise ValueError(f"roles out of order: message {number} is of {message['role']!r} after {previous!r}")
        previous = message["role"]
    if not tokenizer.chat_template:
        raise ValueError("the row holds messages, but the model has no chat template: choose a chat model or columns of strings")
    try:  # transformers 5 would return a dict but for return_dict
        return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from None


def encode_chat(tokenizer, messages: list, first_trained: int = 0) -> tuple[list[int], list[int]]:
    """`input_ids` and `loss_mask` of a conversation: the mask covers the assistant turns from message `first_trained` on.

    A turn reaches from the generation prompt through its end-of-turn token. Few templates mark it, so it is found by rendering
    the conversation up to it; a template that renders the same beginning differently later on is refused.
    """
    input_ids = render(tokenizer, messages)
    loss_mask = [0] * len(input_ids)
    for turn in range(first_trained, len(messages)):
        if messages[turn]["role"] != "assistant":
            continue
        prompt, whole = render(tokenizer, messages[:turn], add_generation_prompt=True), render(tokenizer, messages[:turn + 1])
        start = shared_length(prompt, input_ids)  # one token before its end if an answer's first newline merges with the header's last
        if start < len(prompt) - 1 or input_ids[:len(whole)] != whole:
            raise ValueError(f"the chat template rewrites message {turn + 1} or those before it once others follow: end the row with that turn")
        stops = [i for i in range(start, len(whole)) if whole[i] in (tokenizer.eos_token_id, end_of_turn_id(tokenizer))]
        end = stops[-1] + 1 if stops else len(whole)  # the newline that many templates write after it is not the model's to say
        loss_mask[start:end] = [1] * (end - start)
    return input_ids, loss_mask


def shared_length(a: list, b: list) -> int:
    """How many items two lists have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def encode_prompt(tokenizer, prompt: str | list) -> list[int]:
    """The token ids up to the point where the model answers."""
    return tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else render(tokenizer, prompt, add_generation_prompt=True)


def encode_text(tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """`input_ids` and `loss_mask` of two strings; eos closes the completion.

    Tokenised as one text, because many tokenizers treat the start of a text specially, and divided where the prompt's own ids end.
    """
    if not completion:
        raise ValueError("the completion is empty")
    input_ids = [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
    divide = shared_length(tokenizer(prompt)["input_ids"], input_ids)  # before a token that spans the border
    return input_ids, [0] * divide + [1] * (len(input_ids) - divide)
