import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

import numpy as np

import pictures
import selfsup

TINY = {
    "train.batch": 16,
    "train.epochs": 2,
    "train.knn_every": 1,
    "train.threads": 1,
    "train.loader_threads": 1,
    "network.width": 8,
    "augment.size": 16,
    "optim.warmup_epochs": 0,
}


def train(folder, out, **words):
    words = {"set": {**TINY, **words.pop("set", {})}, "device": "cpu", "progress": False, **words}
    return selfsup.train("simclr-cifar10-small", data=folder, out=out, **words)


class Training(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.root = tempfile.TemporaryDirectory()
        cls.path = Path(cls.root.name)
        cls.folder = pictures.folder(cls.path / "images")
        cls.steps, cls.epochs = [], []
        cls.trained = train(cls.folder, cls.path / "run", on_step=cls.steps.append, on_epoch=cls.epochs.append)

    @classmethod
    def tearDownClass(cls):
        cls.root.cleanup()

    def test_callbacks_get_dictionaries(self):
        self.assertEqual([s["step"] for s in self.steps], list(range(1, 7)))
        self.assertEqual((self.steps[0]["total"], len(self.epochs)), (6, 2))
        self.assertIsInstance(self.epochs[1]["knn"], float)
        self.assertTrue(self.epochs[1]["monitors"])
        json.dumps([self.steps, self.epochs])
        logged = [line for line in self.trained.metrics() if "lr" in line]
        self.assertEqual([line["loss"] for line in logged], [s["loss"] for s in self.steps])

    def test_recipe_report_and_backbone(self):
        self.assertEqual(self.trained.recipe["train"]["epochs"], 2)
        page = self.trained.report(self.path / "page.html")
        self.assertEqual((self.path / "page.html").read_text(), page.html)
        self.assertTrue(page._repr_html_().startswith("<iframe"))
        weights = self.trained.backbone()
        self.assertEqual(weights["conv1.weight"].shape[:2], (8, 3))
        self.assertIn("layer4.1.bn2.running_var", weights)

    def test_features_of_arrays_and_files_are_those_of_the_folder(self):
        features = selfsup.embed(self.trained, self.folder, device="cpu")
        self.assertEqual((features.shape[0], features.dtype), (48, np.float32))
        files = sorted(Path(self.folder, "train").rglob("*.png"))
        arrays = [pictures.pixels(48)[int(f.stem)] for f in files]
        for images in (files, arrays, np.stack(arrays)):
            self.assertTrue(np.array_equal(selfsup.embed(self.trained, images, device="cpu"), features))
        one = selfsup.embed(self.trained, files[:1], size=16, device="cpu")
        self.assertTrue(np.allclose(one, features[:1], atol=1e-6))

    def test_accuracies(self):
        found = selfsup.knn(self.trained, k=5, device="cpu")
        self.assertEqual(sorted(found), ["random init", "raw pixels", "trained"])
        self.assertGreater(found["raw pixels"], 0.9)
        probe = selfsup.linear_probe(self.trained, epochs=5, device="cpu")
        self.assertEqual(sorted(probe), ["random init", "trained"])
        features = selfsup.embed(self.trained, self.folder, device="cpu")
        held_out = selfsup.embed(self.trained, self.folder, split="test", device="cpu")
        labels, held_out_labels = [0] * 24 + [1] * 24, [0] * 8 + [1] * 8
        own = selfsup.knn_accuracy(features, labels, held_out, held_out_labels, k=5)
        self.assertEqual(own, found["trained"])
        points = np.repeat([[0.0, 1.0], [1.0, 0.0]], 20, axis=0)
        self.assertEqual(selfsup.probe_accuracy(points, [0] * 20 + [1] * 20, points, [0] * 20 + [1] * 20), 1.0)

    def test_an_exception_in_a_callback_stops_the_run_which_can_go_on(self):
        class Enough(Exception):
            pass

        def stop(step):
            if step["step"] == 4:
                raise Enough("of this")

        out = self.path / "stopped"
        with self.assertRaisesRegex(Enough, "of this"):
            train(self.folder, out, on_step=stop)
        self.assertTrue(list(out.glob("step-*.safetensors")))
        run = selfsup.resume(out, device="cpu", progress=False)
        whole, resumed = self.trained.backbone(), run.backbone()
        self.assertTrue(all(np.array_equal(whole[name], resumed[name]) for name in whole))

    def test_ctrl_c_writes_a_checkpoint(self):
        out = self.path / "interrupted"

        def interrupt(step):
            if step["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)

        with self.assertRaisesRegex(KeyboardInterrupt, r"selfsup\.resume\(.*interrupted"):
            train(self.folder, out, on_step=interrupt, set={"train.epochs": 50})
        self.assertTrue(list(out.glob("step-*.safetensors")))

    def test_recipes_are_dictionaries(self):
        self.assertIn("simclr-cifar10-small", selfsup.recipes())
        table = selfsup.recipe("simclr-cifar10-small", set={"train.epochs": 1, "data.path": self.folder})
        table["train"].update(batch=16, threads=1)
        table["network"]["width"] = 8
        run = selfsup.train(table, out=self.path / "dict", device="cpu", progress=False)
        self.assertEqual(run.recipe["train"]["batch"], 16)

    def test_progress_is_printed(self):
        code = "import selfsup, sys; selfsup.resume(sys.argv[1], device='cpu')"
        done = subprocess.run([sys.executable, "-c", code, str(self.path / "run")], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (0, ""))
        self.assertIn("going on after step 6", done.stderr)


class Program(unittest.TestCase):
    def test_the_wheel_carries_the_program(self):
        script = Path(sys.executable).with_name("selfsup")
        for command in ([script], [sys.executable, "-m", "selfsup"]):
            done = subprocess.run([*command, "recipes"], capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual([line.split()[0] for line in done.stdout.splitlines()], selfsup.recipes())
            wrong = subprocess.run([*command, "recipes", "simclr-cifar"], capture_output=True, text=True)
            self.assertEqual((wrong.returncode, wrong.stdout), (2, ""))
            self.assertIn("unknown recipe simclr-cifar", wrong.stderr)

    def test_ctrl_c_in_the_program_writes_a_checkpoint(self):
        with tempfile.TemporaryDirectory() as root:
            folder = pictures.folder(Path(root) / "images")
            settings = [w for k, v in {**TINY, "train.epochs": 1000, "data.path": folder}.items() for w in ("--set", f"{k}={v}")]
            words = ["train", "simclr-cifar10-small", "--out", f"{root}/run", "--device", "cpu", *settings]
            program = subprocess.Popen([sys.executable, "-m", "selfsup", *words], stderr=subprocess.PIPE, text=True)
            metrics = Path(root, "run", "metrics.jsonl")
            deadline = time.monotonic() + 60
            while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.05)
            program.send_signal(signal.SIGINT)
            _, said = program.communicate(timeout=60)
            self.assertEqual(program.returncode, 1, said)
            self.assertIn("--resume", said)
            self.assertTrue(list(Path(root, "run").glob("step-*.safetensors")))


if __name__ == "__main__":
    unittest.main()
