"""pivotkv and pivotkvd from the outside: usage, exit codes, JSON, numbers that add up, refusals to start. Needs no packages."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

CLI, DAEMON = os.environ["PIVOTKV_CLI"], os.environ["PIVOTKVD"]
EXAMPLE = pathlib.Path(os.environ["PIVOTKV_BUILD_DIR"]) / "client" / "examples" / "attend"
sys.path.insert(0, str(pathlib.Path(os.environ["PIVOTKV_SOURCE_DIR"]) / "client" / "examples"))
from daemon import PrivateDaemon  # noqa: E402

GOOD, FAILED, USAGE, NO_DAEMON = 0, 1, 2, 3


def run(*arguments, env=None):
    return subprocess.run([CLI, *arguments], capture_output=True, text=True, timeout=60, check=False,
                          env={**os.environ, **(env or {})})


def start(*flags):
    """pivotkvd that is expected not to start: (status, stderr)."""
    done = subprocess.run([DAEMON, *flags], capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stderr


class Usage(unittest.TestCase):
    def test_wrong_usage(self):
        for arguments in ([], ["none"], ["stat", "extra"], ["stat", "--format", "xml"], ["stat", "--socket"], ["inspect"],
                          ["stat", "--timeout-ms", "0"], ["bench"], ["bench", "host", "--scale", "0"],
                          ["bench", "host", "--only", "nothing"]):
            done = run(*arguments)
            self.assertEqual(done.returncode, USAGE, (arguments, done.stderr))
            self.assertTrue(done.stderr.startswith(("pivotkv: ", "AMD", "Intel")) or "pivotkv: " in done.stderr, done.stderr)

    def test_help_and_version(self):
        for flag in ("--help", "--version"):
            for program in (CLI, DAEMON):
                done = subprocess.run([program, flag], capture_output=True, text=True, timeout=60, check=False)
                self.assertEqual((done.returncode, done.stderr), (GOOD, ""))
        self.assertIn("inspect", run("--help").stdout)

    def test_no_daemon(self):
        for verb in (["stat"], ["ls"], ["inspect", "0x100000000"]):
            done = run(*verb, "--socket", "/tmp/pivotkv-none/socket")
            self.assertEqual(done.returncode, NO_DAEMON)
            self.assertIn("start pivotkvd", done.stderr)

    def test_doctor(self):
        done = run("doctor", "--format", "json", "--socket", "/tmp/pivotkv-none/socket")
        rows = {row["check"]: row for row in json.loads(done.stdout)}
        self.assertIn(done.returncode, (GOOD, FAILED))
        self.assertEqual(done.returncode == FAILED, any(row["status"] == "fail" for row in rows.values()))
        self.assertEqual(rows["daemon"]["status"], "warn")
        for row in rows.values():
            self.assertEqual(bool(row["advice"]), row["status"] != "ok", row)
        self.assertEqual(run("doctor", "--socket", "/tmp/" + "x" * 120).returncode, FAILED)

    def doctor_with(self, module):
        done = run("doctor", "--format", "json", "--socket", "/tmp/pivotkv-none/socket",
                   env={"PIVOTKV_CUDA_MODULE": module})
        return {row["check"]: row for row in json.loads(done.stdout)}

    def test_doctor_of_gpus(self):
        rows = self.doctor_with("/nonexistent/module.so")
        self.assertEqual(rows["CUDA module"]["status"], "warn")
        self.assertIn("/nonexistent/module.so", rows["CUDA module"]["found"])
        self.assertNotIn("GPU 0", rows)
        rows = self.doctor_with(os.environ["PIVOTKV_OTHER_MODULE"])
        self.assertIn("of another release", rows["CUDA module"]["found"])
        rows = self.doctor_with(os.environ["PIVOTKV_FAKE_MODULE"])
        self.assertEqual([rows[name]["status"] for name in ("CUDA module", "CUDA driver", "GPU 0")], ["ok"] * 3)
        self.assertIn("CUDA 13.0, 1 device", rows["CUDA driver"]["found"])
        self.assertIn("GPU-face0000-", rows["GPU 0"]["found"])


class Daemon(unittest.TestCase):
    def test_bad_flags(self):
        with tempfile.TemporaryDirectory() as folder:
            config = pathlib.Path(folder) / "conf"
            config.write_text("[pivotkv]\npool-bytes = many\n", encoding="utf-8")
            other = pathlib.Path(folder) / "other"
            other.write_text("[pivotkv]\nno-such = 1\n", encoding="utf-8")
            for flags, word in ((["--nothing"], "not a flag"), (["--pool-bytes"], "needs a value"),
                                (["--pool-bytes", "12X"], "pool-bytes"), (["--pool-bytes", "1"], "from"),
                                (["--chunk-bytes", "3M"], "power of two"), (["--io", "fast"], "auto uring epoll"),
                                (["--backend", "tpu"], "host cuda auto"), (["--device", "x" * 300], "longer than 255 bytes"),
                                (["--audit-ppm", "1000001"], "from 0 to 1000000"),
                                (["--audit-alarm-ppm", "much"], "audit-alarm-ppm"),
                                (["--config", str(config)], "pool-bytes"), (["--config", str(other)], "not a setting"),
                                (["--config", folder + "/none"], "No such file")):
                status, said = start(*flags)
                self.assertEqual(status, USAGE, said)
                self.assertIn(word, said)

    def test_refuses_to_start(self):
        small = ["--pool-bytes", "4M", "--arena-bytes", "4M"]
        status, said = start("--socket", "/tmp/" + "x" * 120, *small)
        self.assertEqual(status, 1)
        self.assertIn("107 bytes", said)
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            status, said = start("--socket", folder + "/socket", *small)
            self.assertEqual(status, 1)
            self.assertIn("0700", said)
            os.chmod(folder, 0o700)
            status, said = start("--socket", folder + "/socket", "--pool-bytes", "1G", "--arena-bytes", "800G")
            self.assertEqual(status, 1)
            self.assertIn("no memory", said)
            self.assertEqual(sorted(os.listdir(folder)), ["socket.lock"])

    def test_second_daemon_and_restart(self):
        with PrivateDaemon(pathlib.Path(DAEMON), pool_bytes=4 << 20, arena_bytes=4 << 20) as daemon:
            status, said = start("--socket", daemon.socket, "--pool-bytes", "4M", "--arena-bytes", "4M")
            self.assertEqual(status, 1)
            self.assertIn("another daemon", said)
            self.assertEqual(run("stat", "--socket", daemon.socket).returncode, GOOD)
            daemon.kill()  # its socket stays behind; the next one takes the path over
            self.assertEqual(run("stat", "--socket", daemon.socket, "--timeout-ms", "300").returncode, NO_DAEMON)
            flags = ["--socket", daemon.socket, "--pool-bytes", "4M", "--arena-bytes", "4M", "--io", "epoll"]
            with subprocess.Popen([DAEMON, *flags], stderr=subprocess.PIPE, text=True) as again:
                said = again.stderr.readline()
                self.assertIn("epoll", said)
                self.assertEqual(json.loads(run("stat", "--socket", daemon.socket, "--format", "json").stdout)["io"], "epoll")
                again.send_signal(signal.SIGTERM)
                self.assertEqual(again.wait(20), 0)


class Service(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = PrivateDaemon(pathlib.Path(DAEMON), pool_bytes=16 << 20, arena_bytes=128 << 20)
        cls.env = {"PIVOTKV_SOCKET": cls.daemon.socket}

    @classmethod
    def tearDownClass(cls):
        cls.daemon.stop()

    def json(self, *arguments):
        done = run(*arguments, "--format", "json", env=self.env)
        self.assertEqual(done.returncode, GOOD, done.stderr)
        return json.loads(done.stdout)

    def test_numbers_add_up(self):
        with subprocess.Popen([EXAMPLE, self.daemon.socket], stdout=subprocess.PIPE, text=True) as worker:
            worker.stdout.readline()
            os.kill(worker.pid, signal.SIGSTOP)  # a worker in the middle of its work
            time.sleep(0.3)
            stat, ls = self.json("stat"), self.json("ls")["sequences"]
            inspected = self.json("inspect", ls[0]["seq"])
            tables = [run(*verb, env=self.env) for verb in (["stat"], ["ls"], ["inspect", ls[0]["seq"]])]
            os.kill(worker.pid, signal.SIGCONT)
            worker.stdout.read()
            self.assertEqual(worker.wait(60), 0)
        self.assertEqual((stat["sequences"], len(ls), len(stat["workers"])), (1, 1, 1))
        for tier in ("pool", "arena"):
            self.assertLessEqual(stat[tier]["used"] + stat[tier]["retired"], stat[tier]["capacity"])
            self.assertEqual(stat[tier]["capacity"], stat[tier]["chunks"] * stat[tier]["chunk_bytes"])
            self.assertEqual(stat[tier]["used"], ls[0][tier + "_bytes"])
        blocks = ls[0]["blocks"]
        total = sum(blocks[key] for key in ("granted", "sealed", "home_pool", "home_arena"))
        self.assertEqual(total, sum(stat["blocks"].values()))
        self.assertEqual(ls[0]["arena_bytes"], total * inspected["block_bytes"])
        for key in blocks:
            self.assertEqual(blocks[key], sum(layer[key] for layer in inspected["layer"]))
        self.assertEqual(inspected["geometry"]["q_heads"], 8)
        self.assertGreater(blocks["home_arena"], 0)  # 20000 tokens do not fit in the pool
        self.assertEqual(stat["audit"], {"share_ppm": 5000, "alarm_ppm": 250000, "alarms": 0})
        quality = stat["models"][0]["quality"]
        self.assertEqual((set(quality), quality["alarm"]), ({"samples", "mass", "error", "alarm"}, False))
        for text in ("audit ", " may take 0.50 %", "alarm", "quiet", stat["models"][0]["name"]):
            self.assertIn(text, tables[0].stdout)
        self.assertEqual(stat["totals"]["tokens_attended"], stat["workers"][0]["counters"]["tokens_attended"])
        for table in tables:
            self.assertEqual((table.returncode, table.stderr), (GOOD, ""))
            self.assertIn("attend" if table is tables[0] else "example", table.stdout)
        after = self.json("stat")
        self.assertEqual((after["sequences"], after["pool"]["used"], after["workers"]), (0, 0, []))
        totals = after["totals"]
        self.assertGreaterEqual(totals["attend_calls"], 10)
        self.assertGreater(totals["attend_call_ns"], 0)
        self.assertEqual(totals["samples"], sum(n for name, n in totals.items() if name.startswith("sample_error_to_")) +
                         totals["sample_error_beyond"])
        gone = run("inspect", ls[0]["seq"], env=self.env)
        self.assertEqual(gone.returncode, FAILED)
        self.assertIn("STALE", gone.stderr)
        self.assertEqual(run("inspect", "nonsense", env=self.env).returncode, FAILED)

    def test_two_workers(self):
        workers = [subprocess.Popen([EXAMPLE, self.daemon.socket], stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for worker in workers:
            out, _ = worker.communicate(timeout=60)
            self.assertEqual((worker.returncode, out.count("step")), (0, 40))

    def test_closed_pipe(self):
        done = subprocess.run(f"'{CLI}' stat --format json | head -c 1", shell=True, env={**os.environ, **self.env},
                              capture_output=True, text=True, timeout=60, check=False)
        self.assertEqual((done.stdout, done.stderr), ("{", ""))

    def test_bench_without_a_gpu(self):
        done = run("bench", "gpu", env={"PIVOTKV_CUDA_MODULE": "/nonexistent"})
        self.assertEqual(done.returncode, 1)
        self.assertIn("no GPU to measure", done.stderr)

    def test_bench(self):
        done = run("bench", "host", "--scale", "32", "--format", "json", "--daemon", DAEMON)
        self.assertEqual(done.returncode, GOOD, done.stderr)
        self.assertIn("CPUs", done.stderr)
        figures = {figure["name"]: figure for figure in json.loads(done.stdout)}
        self.assertEqual(set(figures), {"scan", "attend_128k", "attend_1m", "served_128k", "served_empty", "append_64k",
                                        "audit_128k", "start_8g", "daemon_rss"})
        for figure in figures.values():
            self.assertEqual(set(figure), {"name", "value", "unit", "peer", "peer_value", "ratio", "goal", "met"})


if __name__ == "__main__":
    unittest.main()
