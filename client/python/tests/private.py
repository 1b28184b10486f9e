"""A private daemon and a folder for the tests of a class."""
import os
import pathlib
import tempfile
import unittest

from daemon import PrivateDaemon


class DaemonTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = PrivateDaemon(pathlib.Path(os.environ["PIVOTKVD"]), pool_bytes=32 << 20, arena_bytes=64 << 20)
        cls.addClassCleanup(cls.daemon.stop)
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
