"""tidy.py can fail: each rule is broken once in a small tree, and must be named."""
import pathlib
import tempfile
import unittest

import tidy

HEAD = "/* A file. */\n"


class TidyTest(unittest.TestCase):
    def complaints(self, path: str, text: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            (root / path).parent.mkdir(parents=True)
            (root / path).write_text(text, encoding="utf-8")
            return "\n".join(tidy.check_tree(root))

    def test_clean(self):
        self.assertEqual(self.complaints("gpu/a.c", HEAD + '#include "gpu/gpu.h"\n'), "")

    def test_edge(self):
        self.assertIn("may not know", self.complaints("gpu/a.c", HEAD + '#include "offload/offload.h"\n'))
        self.assertIn("may not know", self.complaints("client/a.c", HEAD + '#include "cachesvc/worker.h"\n'))

    def test_door(self):
        self.assertIn("private", self.complaints("cachesvc/a.c", HEAD + '#include "gpu/kernel.h"\n'))

    def test_spelling(self):
        self.assertIn("from the root", self.complaints("gpu/a.c", HEAD + '#include "gpu.h"\n'))

    def test_pure_core(self):
        self.assertIn("pure", self.complaints("cachesvc/core/a.c", HEAD + "#include <sys/mman.h>\n"))
        self.assertIn("pure", self.complaints("cachesvc/core/a.c", HEAD + "#include <pthread.h>\n"))
        self.assertEqual("", self.complaints("cachesvc/core/a.c", HEAD + "#include <string.h>\n"))

    def test_silence(self):
        self.assertIn("neither print", self.complaints("offload/a.c", HEAD + 'int f(void);\nvoid g(void) { printf("x"); }\n'))
        self.assertEqual("", self.complaints("client/cli/a.c", HEAD + 'void g(void) { printf("x"); }\n'))

    def test_lengths(self):
        self.assertIn("at most 600", self.complaints("gpu/a.c", HEAD + "int x;\n" * 600))
        body = "void f(void)\n{\n" + "    g();\n" * 71 + "}\n"
        self.assertIn("function of 71", self.complaints("gpu/a.c", HEAD + body))
        self.assertIn("columns", self.complaints("gpu/a.c", HEAD + "int x" + " " * 128 + ";\n"))

    def test_form(self):
        self.assertIn("begin with", self.complaints("gpu/a.c", "int x;\n"))
        self.assertIn("white space", self.complaints("gpu/a.c", HEAD + "int x; \n"))


if __name__ == "__main__":
    unittest.main()
