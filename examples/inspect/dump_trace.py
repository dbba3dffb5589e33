#!/usr/bin/env python3
"""Records a prompt's attention inputs from a Hugging Face model, as a trace that kvpare_inspect reads.

    python3 dump_trace.py --model meta-llama/Llama-3.2-1B --prompt-file prompt.txt --out trace.safetensors
    python3 dump_trace.py --model Qwen/Qwen2.5-7B-Instruct --chat --prompt "Why is the sky blue?" --out trace.safetensors
    python3 dump_trace.py --model Qwen/Qwen2.5-VL-3B-Instruct --image photo.jpg --prompt "What is this?" --out trace.safetensors

or from a program of your own, around any forward pass that starts with an empty cache:

    from dump_trace import record
    with record(model) as trace:
        model(**inputs)
    trace.save("trace.safetensors", token_class=token_classes(model.config, inputs["input_ids"][0]))

Needs torch, transformers (4.56 or newer) and safetensors; --image also Pillow and what the model's processor asks for.

How. The models of transformers hand queries, keys and values to an exchangeable attention function, after RoPE
and after any norm of queries and keys, before the kv heads are repeated. While a pass is recorded, this function is
scaled dot product attention with a look at what it is given. So nothing here knows of a model's RoPE, projections or
names; a model whose attention does not go through that function is refused with a sentence.

What is recorded. Causal self-attention layers with a layer number: a vision tower is left out, as is cross-attention.
The trace form has one softmax scale and full attention: layers with a sliding window, a softcap or attention sinks are
recorded, with a warning, and kvpare_inspect treats them as full attention without. A model that rotates by several
positions per token (M-RoPE) comes out right, since keys and queries are rotated already; `positions` number the tokens.
"""

import argparse
import contextlib
import sys

IMAGE, VIDEO, AUDIO = 1, 2, 3  # 0 is text


class Refused(Exception):
    """What was asked can not be recorded; the message says why."""


class Trace:
    """What the attention of each layer was given: lists of [tokens, heads, width], one entry per layer."""

    def __init__(self):
        self.queries, self.keys, self.values = {}, {}, {}
        self.scale = None
        self.metadata = {}
        self.warnings = []

    def tokens(self):
        return next(iter(self.queries.values())).shape[0] if self.queries else 0

    def add(self, module, query, key, value, scale, options):
        """One layer's arguments: [1, heads, tokens, width] each."""
        layer = getattr(module, "layer_idx", None)
        if layer is None or not getattr(module, "is_causal", True):
            return  # a vision tower's, or cross-attention
        if query.shape[0] != 1:
            raise Refused(f"layer {layer}: a batch of {query.shape[0]} prompts, must be one")
        if layer in self.queries:
            raise Refused(f"layer {layer} ran twice: record one forward pass, not a generation")
        if query.shape[2] != key.shape[2]:
            raise Refused(f"layer {layer}: {query.shape[2]} queries on {key.shape[2]} keys, must be as many: "
                          "record the prefill of a prompt, with an empty cache")
        scale = float(scale if scale is not None else query.shape[-1] ** -0.5)
        if self.scale is not None and scale != self.scale:
            raise Refused(f"layer {layer}: softmax scale {scale}, layers before have {self.scale}, a trace has one")
        self.scale = scale
        for name in ("sliding_window", "softcap", "s_aux"):
            value_of = options.get(name)
            if value_of is None or (name == "sliding_window" and value_of >= key.shape[2]):
                continue
            words = {"sliding_window": "a sliding window", "softcap": "a softcap", "s_aux": "attention sinks"}[name]
            self.warnings.append(f"layer {layer} has {words}, which a trace does not carry")
        for store, tensor in ((self.queries, query), (self.keys, key), (self.values, value)):
            store[layer] = tensor.detach()[0].transpose(0, 1).to("cpu").contiguous()

    def save(self, path, token_class=None, metadata=None):
        """Writes the safetensors file. `token_class`: one small number per token, see kvpare_inspect's README."""
        import torch
        from safetensors.torch import save_file

        if not self.queries:
            raise Refused("no attention layer was seen: does this model's attention go through transformers' "
                          "attention functions (ALL_ATTENTION_FUNCTIONS)?")
        if sorted(self.queries) != list(range(len(self.queries))):
            raise Refused(f"only layers {sorted(self.queries)} were seen, the others have no ordinary attention")
        arrays = {"positions": torch.arange(self.tokens(), dtype=torch.int32)}
        if token_class is not None:
            arrays["token_class"] = torch.as_tensor(token_class, dtype=torch.uint8).contiguous()
            if arrays["token_class"].shape != (self.tokens(),):
                raise Refused(f"token_class has shape {list(arrays['token_class'].shape)}, must be [{self.tokens()}]")
        for layer in self.queries:
            arrays[f"layers.{layer}.q"] = as_written(self.queries[layer])
            arrays[f"layers.{layer}.k"] = as_written(self.keys[layer])
            arrays[f"layers.{layer}.v"] = as_written(self.values[layer])
        texts = {"softmax_scale": repr(self.scale), **self.metadata, **(metadata or {})}
        save_file(arrays, path, metadata={name: str(text) for name, text in texts.items()})


def as_written(tensor):
    """float, half and bfloat16 as they are, anything else as float."""
    import torch

    return tensor if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) else tensor.to(torch.float32)


@contextlib.contextmanager
def record(model):
    """Gives a Trace that fills during a forward pass of `model` inside the block."""
    import torch
    check_version()
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    trace = Trace()
    describe(model.config, trace.metadata)
    ordinary = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module, query, key, value, *arguments, **options):
        trace.add(module, query, key, value, options.get("scaling"), options)
        return ordinary(module, query, key, value, *arguments, **options)

    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    ALL_ATTENTION_FUNCTIONS["sdpa"] = watched
    try:
        with torch.no_grad():
            yield trace
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = ordinary
        model.set_attn_implementation(before)


def check_version():
    import transformers

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (4, 56):
        raise Refused(f"transformers {transformers.__version__}, must be 4.56 or newer")


def describe(config, metadata):
    """What is known of the model's rotation; which channels turn together is not, see --metadata."""
    text = text_config(config)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    theta = rope.get("rope_theta", getattr(text, "rope_theta", None))
    if theta is not None:
        metadata["rope_theta"] = str(theta)
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in (None, "default"):
        metadata["rope_type"] = str(kind)
    partial = rope.get("partial_rotary_factor", getattr(text, "partial_rotary_factor", None))
    if partial not in (None, 1, 1.0):
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        metadata["rope_dim"] = str(int(head_dim * partial))
    if rope.get("mrope_section") is not None:
        metadata["rope_sections"] = ",".join(str(n) for n in rope["mrope_section"])
    if getattr(config, "_name_or_path", ""):
        metadata["model"] = config._name_or_path


def text_config(config):
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def token_classes(config, input_ids):
    """Image, video and audio placeholders by their ids, all else text; None where the model has no such tokens."""
    ids = {}
    for kind, token_class in (("image", IMAGE), ("video", VIDEO), ("audio", AUDIO)):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if getattr(config, name, None) is not None:
                ids[getattr(config, name)] = token_class
    return [ids.get(int(token), 0) for token in input_ids] if ids else None


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="name or folder, as for from_pretrained")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the prompt")
    source.add_argument("--prompt-file", help="a text file with the prompt")
    parser.add_argument("--out", required=True, help="the trace to write (.safetensors)")
    parser.add_argument("--image", action="append", default=[], help="a picture before the prompt; may be repeated")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template "
                        "(always so with --image)")
    parser.add_argument("--max-tokens", type=int, help="cut a text prompt after this many tokens")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16", "auto"), default="auto",
                        help="what the model computes in, and the trace holds (default: as the model was stored)")
    parser.add_argument("--device", default="cpu", help="where the model runs, e.g. cuda (default: cpu)")
    parser.add_argument("--metadata", action="append", default=[], metavar="NAME=TEXT",
                        help="a text to put into the file, e.g. rope_pairing=halves; may be repeated")
    return parser.parse_args()


def prepare(arguments, prompt):
    """The model and its inputs."""
    import torch
    import transformers

    check_version()
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    settings = {"dtype": dtype, "attn_implementation": "sdpa"}
    if arguments.image:
        from PIL import Image

        model = transformers.AutoModelForImageTextToText.from_pretrained(arguments.model, **settings)
        processor = transformers.AutoProcessor.from_pretrained(arguments.model)
        content = [{"type": "image", "image": Image.open(path).convert("RGB")} for path in arguments.image]
        content.append({"type": "text", "text": prompt})
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                               tokenize=True, return_dict=True, return_tensors="pt")
        return model, inputs
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, **settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    if arguments.chat:
        inputs = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                               tokenize=True, return_dict=True, return_tensors="pt")
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if arguments.max_tokens:
        inputs = {name: tensor[:, :arguments.max_tokens] for name, tensor in inputs.items()}
    return model, inputs


def main():
    arguments = read_arguments()
    if arguments.max_tokens is not None and (arguments.max_tokens < 1 or arguments.image):
        raise Refused("--max-tokens must be at least 1, and does not go with --image")
    extra = dict(text.split("=", 1) if "=" in text else (text, None) for text in arguments.metadata)
    for name, text in extra.items():
        if text is None:
            raise Refused(f"--metadata {name}: must be NAME=TEXT")
    if arguments.prompt_file:
        with open(arguments.prompt_file, encoding="utf-8") as file:
            prompt = file.read()
    else:
        prompt = arguments.prompt

    model, inputs = prepare(arguments, prompt)
    model = model.to(arguments.device).eval()
    inputs = {name: value.to(arguments.device) if hasattr(value, "to") else value for name, value in inputs.items()}
    if inputs["input_ids"].shape[1] == 0:
        raise Refused("the prompt has no tokens")
    with record(model) as trace:
        model(**inputs, use_cache=False)
    classes = token_classes(model.config, inputs["input_ids"][0])
    trace.save(arguments.out, token_class=classes, metadata={"model": arguments.model, **extra})
    for warning in trace.warnings:
        print(f"dump_trace: {warning}", file=sys.stderr)
    print(f"wrote {arguments.out}: {len(trace.queries)} layers, {trace.tokens()} tokens")


if __name__ == "__main__":
    try:
        main()
    except (Refused, ImportError, OSError) as error:
        sys.exit(f"dump_trace: {error}")
