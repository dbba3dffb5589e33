"""dump_trace.py on small models with random weights: what it writes is what attention was given, and kvpare_inspect
reads it.

    python3 dump_trace_test.py PATH_OF_KVPARE_INSPECT

Attention is computed once more from the file alone, in doubles, and must give what the model's own attention gave.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

import torch
import transformers
from safetensors import safe_open

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import dump_trace  # noqa: E402

INSPECT = sys.argv.pop(1) if len(sys.argv) > 1 else None
SMALL = dict(vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=128)


def build(config):
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def read(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def attention_again(arrays, metadata, layer):
    """[tokens, q_heads * value_dim], from the file alone."""
    q, k, v = (arrays[f"layers.{layer}.{which}"].double().transpose(0, 1) for which in "qkv")
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    logits = float(metadata["softmax_scale"]) * q @ k.transpose(1, 2)
    seen = torch.ones(logits.shape[1:], dtype=torch.bool).tril()
    out = logits.masked_fill(~seen, float("-inf")).softmax(-1) @ v
    return out.transpose(0, 1).flatten(1)


class DumpTrace(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.path = str(self.folder / "trace.safetensors")

    def inspect(self, *options):
        """What kvpare_inspect says of the trace."""
        out = self.folder / "out.json"
        subprocess.run([INSPECT, "--trace", self.path, "--json", str(out), *options], check=True,
                       stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())

    def record(self, model, inputs, **options):
        given = {}
        for name, module in model.named_modules():
            if name.endswith("self_attn.o_proj"):
                layer = int(name.split(".")[-3])
                module.register_forward_pre_hook(
                    lambda _, arguments, layer=layer: given.__setitem__(layer, arguments[0][0].double()))
        with dump_trace.record(model) as trace:
            model(**inputs)
        trace.save(self.path, **options)
        return given

    def check_model(self, model):
        inputs = {"input_ids": torch.randint(0, 64, (1, 37))}
        given = self.record(model, inputs)
        arrays, metadata = read(self.path)
        self.assertEqual(len(arrays), 1 + 3 * 3)
        self.assertEqual(arrays["positions"].tolist(), list(range(37)))
        for layer in range(3):
            self.assertEqual(tuple(arrays[f"layers.{layer}.k"].shape)[:2], (37, 2))
            torch.testing.assert_close(attention_again(arrays, metadata, layer), given[layer].detach(), atol=2e-5,
                                       rtol=1e-4)
        found = self.inspect("--policy", "h2o(keep=0.5)", "--rows", "4")
        self.assertEqual(found["trace"]["tokens"], 37)
        self.assertEqual(len(found["runs"][0]["layers"]), 3)
        self.assertGreater(found["runs"][0]["relative_l2"], 0)
        self.assertLess(found["runs"][0]["tokens_after"], found["runs"][0]["tokens_before"])
        return metadata

    def test_llama(self):
        metadata = self.check_model(build(transformers.LlamaConfig(**SMALL)))
        self.assertEqual(float(metadata["rope_theta"]), 10000)

    def test_qwen2(self):
        self.check_model(build(transformers.Qwen2Config(**SMALL)))

    def test_mistral(self):
        self.check_model(build(transformers.MistralConfig(**SMALL, head_dim=16)))

    def test_qwen3_normalises_queries_and_keys(self):
        self.check_model(build(transformers.Qwen3Config(**SMALL, head_dim=16)))

    def test_bfloat16_stays(self):
        model = build(transformers.LlamaConfig(**SMALL)).to(torch.bfloat16)
        self.record(model, {"input_ids": torch.randint(0, 64, (1, 9))})
        arrays, _ = read(self.path)
        self.assertEqual(arrays["layers.2.v"].dtype, torch.bfloat16)
        self.assertEqual(self.inspect()["page_element_type"], "bfloat16")

    def test_a_picture_is_marked_and_its_tower_left_out(self):
        model = llava()
        ids = torch.tensor([[1] + [60] * 16 + [5, 6, 7]])
        given = self.record(model, {"input_ids": ids, "pixel_values": torch.rand(1, 3, 16, 16)},
                            token_class=dump_trace.token_classes(model.config, ids[0]))
        arrays, metadata = read(self.path)
        self.assertEqual(arrays["token_class"].tolist(), [0] + [1] * 16 + [0] * 3)
        self.assertEqual(len(arrays), 2 + 3 * 3)
        torch.testing.assert_close(attention_again(arrays, metadata, 1), given[1].detach(), atol=2e-5, rtol=1e-4)
        run = self.inspect("--policy", "air_cache(keep=0.25)")["runs"][0]
        self.assertEqual(sum(layer["budget"] for layer in run["layers"]), 12)
        self.assertTrue({0, 17, 18, 19} <= set(run["layers"][0]["kept"][0]), "text stays")

    def test_afterwards_the_model_is_as_before(self):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        model = build(transformers.LlamaConfig(**SMALL))
        model.set_attn_implementation("eager")
        ordinary = ALL_ATTENTION_FUNCTIONS["sdpa"]
        with self.assertRaises(dump_trace.Refused):
            with dump_trace.record(model):
                model(input_ids=torch.zeros(2, 5, dtype=torch.long))
        self.assertIs(ALL_ATTENTION_FUNCTIONS["sdpa"], ordinary)
        self.assertEqual(model.config._attn_implementation, "eager")

    def refusal(self, pass_of):
        model = build(transformers.LlamaConfig(**SMALL))
        with self.assertRaises(dump_trace.Refused) as caught:
            with dump_trace.record(model) as trace:
                pass_of(model)
            trace.save(self.path)
        return str(caught.exception)

    def test_what_can_not_be_recorded_is_refused(self):
        ids = torch.randint(0, 64, (1, 5))
        self.assertIn("a batch of 2 prompts", self.refusal(lambda model: model(input_ids=ids.repeat(2, 1))))
        self.assertIn("ran twice", self.refusal(lambda model: model.generate(ids, max_new_tokens=3)))
        self.assertIn("no attention layer was seen", self.refusal(lambda model: None))

        def with_a_past(model):
            with torch.no_grad():
                past = transformers.DynamicCache()
                past.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
                model(input_ids=ids, past_key_values=past)

        self.assertIn("5 queries on 9 keys", self.refusal(with_a_past))

    def test_a_sliding_window_is_told(self):
        model = build(transformers.MistralConfig(**{**SMALL, "sliding_window": 8}))
        with dump_trace.record(model) as trace:
            model(input_ids=torch.randint(0, 64, (1, 20)))
        self.assertIn("layer 0 has a sliding window", trace.warnings[0])

    def program(self):
        return [sys.executable, dump_trace.__file__, "--model", str(self.folder / "model"), "--out", self.path]

    def test_as_a_program(self):
        words = ["[UNK]"] + [f"word{i}" for i in range(63)]
        tokenizer_of(words).save_pretrained(self.folder / "model")
        build(transformers.LlamaConfig(**SMALL)).save_pretrained(self.folder / "model")
        program = self.program()
        done = subprocess.run([*program, "--prompt", " ".join(words[1:30]), "--max-tokens", "20",
                               "--metadata", "rope_pairing=halves"], capture_output=True, text=True, check=True)
        self.assertIn("3 layers, 20 tokens", done.stdout)
        self.assertEqual(read(self.path)[1]["rope_pairing"], "halves")
        subprocess.run([*program, "--prompt", "word1 word2", "--dtype", "float16"], check=True, stdout=subprocess.DEVNULL)
        self.assertEqual(read(self.path)[0]["layers.0.q"].dtype, torch.float16)
        wrong = subprocess.run([*program, "--prompt", ""], capture_output=True, text=True)
        self.assertEqual(wrong.returncode, 1)
        self.assertEqual(wrong.stderr.splitlines()[-1], "dump_trace: the prompt has no tokens")


    @unittest.skipUnless(importlib.util.find_spec("PIL"), "needs Pillow")
    def test_as_a_program_with_a_picture(self):
        from PIL import Image

        model = llava()
        tokenizer = tokenizer_of([f"word{i}" for i in range(60)] + ["<image>", "[UNK]"])
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        template = ("{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
                    "<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}")
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        transformers.LlavaProcessor(images, tokenizer, patch_size=4, vision_feature_select_strategy="default",
                                    chat_template=template, image_token="<image>",
                                    num_additional_image_tokens=1).save_pretrained(self.folder / "model")
        model.save_pretrained(self.folder / "model")
        Image.new("RGB", (40, 30), (200, 30, 30)).save(self.folder / "photo.png")
        subprocess.run([*self.program(), "--image", str(self.folder / "photo.png"), "--prompt", "word1 word2"],
                       check=True, stdout=subprocess.DEVNULL)
        self.assertEqual(read(self.path)[0]["token_class"].tolist(), [1] * 16 + [0, 0])


def tokenizer_of(words):
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def llava():
    """A picture of 16 x 16 pixels is 16 tokens."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                                                    num_attention_heads=2, image_size=16, patch_size=4),
        text_config=transformers.LlamaConfig(**SMALL), image_token_index=60, vision_feature_layer=-1)
    torch.manual_seed(1)
    return transformers.LlavaForConditionalGeneration(config).eval()


if __name__ == "__main__":
    if INSPECT is None:
        sys.exit(__doc__)
    unittest.main()
