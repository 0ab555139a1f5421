"""A real byte-level BPE tokenizer of some hundred tokens, trained here, and a template to go with it."""
from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

class TinyTokenizer:
    def __init__(self):
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        tr = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<|u|>", "<|a|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
        tok.train_from_iterator(["hello world the quick brown fox jumps over the lazy dog"] * 5, tr)
        self.t = tok
        self.special_ids = {0, 1, 2, 3}
        self.eos_token_ids = (1,)
        bs = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
        cs = bs[:]
        n = 0
        for b in range(256):
            if b not in bs:
                bs.append(b); cs.append(256 + n); n += 1
        self.map = {chr(c): b for b, c in zip(bs, cs)}
        self.max_token_bytes = 16
    @property
    def vocab_size(self): return self.t.get_vocab_size()
    def encode(self, text, add_special_tokens=True): return self.t.encode(text, add_special_tokens=add_special_tokens).ids
    def decode(self, ids, skip_special_tokens=True): return self.t.decode(list(ids), skip_special_tokens=skip_special_tokens)
    def token_bytes(self, i):
        s = self.t.id_to_token(i)
        if i in self.special_ids: return s.encode()
        return bytes(self.map[c] for c in s)

class TinyTemplate:
    def render(self, messages, add_generation_prompt=True, continue_final_message=False, **kwargs):
        if any(m["content"] == "REFUSE" for m in messages):
            raise ValueError("refused by the template")
        return "".join(f"<|u|>{m['role']}: {m['content']}</s>" for m in messages) + ("<|a|>" if add_generation_prompt else "")
