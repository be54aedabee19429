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

    def test_an_exception_in_a_callback_stays_the_callers(self):
        class Own(Exception):
            stopped = property(lambda self: None)

            def __setattr__(self, name, value):
                raise TypeError(name)

            add_note = None

        def stop(_):
            raise Own("mine")

        with self.assertRaisesRegex(Own, "mine"):
            train(self.folder, self.path / "own", on_step=stop)

    def test_ctrl_c_writes_a_checkpoint(self):
        pictures.hear_ctrl_c(self)
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
        table["optim"]["lr"] = np.float32(0.25)
        run = selfsup.train(table, out=self.path / "dict", device="cpu", progress=False)
        self.assertEqual((run.recipe["train"]["batch"], run.recipe["optim"]["lr"]), (16, 0.25))

    def test_numbers_of_numpy_are_settings(self):
        given = {"method.temperature": np.float64(0.3), "optim.lr": np.float32(0.5), "train.epochs": np.int64(7), "data.range": np.array([0.5, 9])}
        table = selfsup.recipe("demo", set={**given, "data.bits": 16, "augment.pixels": "float"})
        found = table["method"]["temperature"], table["optim"]["lr"], table["train"]["epochs"], tuple(table["data"]["range"])
        self.assertEqual(found, (0.3, 0.5, 7, (0.5, 9)))

    def test_progress_is_printed(self):
        code = "import selfsup, sys; selfsup.resume(sys.argv[1], device='cpu')"
        done = subprocess.run([sys.executable, "-c", code, str(self.path / "run")], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (0, ""))
        self.assertIn("going on after step 6", done.stderr)


class Memory(unittest.TestCase):
    """Runs on images in memory."""

    @classmethod
    def setUpClass(cls):
        cls.root = tempfile.TemporaryDirectory()
        cls.path = Path(cls.root.name)
        cls.folder = pictures.folder(cls.path / "images")
        # In the folder's order, by class: down has the even ones.
        order = lambda count: [*range(1, count, 2), *range(0, count, 2)]
        cls.images, cls.labels = pictures.pixels(48)[order(48)], [0] * 24 + [1] * 24
        cls.held_out = pictures.pixels(16, seed=2)[order(16)], np.array([0] * 8 + [1] * 8)

    @classmethod
    def tearDownClass(cls):
        cls.root.cleanup()

    def test_a_run_on_arrays_is_the_run_on_their_files(self):
        of_files = train(self.folder, self.path / "files")
        of_arrays = train((self.images, self.labels), self.path / "arrays", held_out=self.held_out)
        figures = lambda run: [{k: v for k, v in line.items() if "second" not in k and k != "waiting"} for line in run.metrics()]
        self.assertEqual([m.get("loss") for m in figures(of_arrays)], [m.get("loss") for m in figures(of_files)])
        self.assertEqual([m.get("knn") for m in figures(of_arrays)], [m.get("knn") for m in figures(of_files)])
        weights, others = of_arrays.backbone(), of_files.backbone()
        self.assertTrue(all(np.array_equal(weights[name], others[name]) for name in weights))
        self.assertEqual(of_arrays.recipe["data"]["path"], "(given)")
        # What is measured of a run takes the images again, and says so.
        data = {"data": (self.images, self.labels), "held_out": self.held_out}
        self.assertEqual(selfsup.knn(of_arrays, k=5, device="cpu", **data), selfsup.knn(of_files, k=5, device="cpu"))
        probes = [selfsup.linear_probe(run, epochs=3, device="cpu", **words) for run, words in ((of_arrays, data), (of_files, {}))]
        self.assertEqual(*probes)
        for call, words in ((selfsup.knn, {}), (selfsup.linear_probe, {}), (selfsup.resume, {"progress": False})):
            with self.assertRaisesRegex(selfsup.Error, "given by the program that trained it"):
                call(of_arrays, device="cpu", **words)

    def test_a_run_on_arrays_goes_on(self):
        def stop(step):
            if step["step"] == 4:
                raise InterruptedError

        whole = train(self.images, self.path / "whole")
        with self.assertRaises(InterruptedError):
            train(self.images, self.path / "stopped", on_step=stop)
        run = selfsup.resume(self.path / "stopped", data=self.images, device="cpu", progress=False)
        first, second = whole.backbone(), run.backbone()
        self.assertTrue(all(np.array_equal(first[name], second[name]) for name in first))
        with self.assertRaisesRegex(selfsup.Error, "48 training images, and the set now has 40"):
            selfsup.resume(self.path / "stopped", data=self.images[:40], device="cpu", progress=False)

    def test_other_images_than_photos_are_trained_on_and_embedded(self):
        policy = {"size": 16, "pixels": "float", "flip": 0.5, "noise": {"p": 0.5, "std": [0.01, 0.1]}}
        table = selfsup.recipe("simclr-cifar10-small", set={k: v for k, v in TINY.items() if k != "augment.size"})
        table["augment"] = [policy]
        draw = np.random.default_rng(3)
        bands = draw.integers(0, 4096, (48, 20, 20, 5)).astype(np.uint16)
        run = train_dict(table, bands, self.path / "bands", set={"data.range": (0, 4095)})
        self.assertEqual([run.recipe["data"][key] for key in ("channels", "bits", "range")], [5, 16, (0.0, 4095.0)])
        self.assertEqual(run.backbone()["conv1.weight"].shape[1], 5)
        features = selfsup.embed(run, bands, device="cpu")
        self.assertEqual(features.shape[0], 48)
        # Floats are read by the run's range, and files by its channels and bits.
        self.assertTrue(np.allclose(selfsup.embed(run, bands.astype(np.float32), device="cpu"), features, atol=1e-4))
        for i, image in enumerate(bands[:3]):
            Path(self.path, f"{i}.tiff").write_bytes(pictures.tiff(image))
        files = [self.path / f"{i}.tiff" for i in range(3)]
        self.assertTrue(np.allclose(selfsup.embed(run, files, device="cpu"), features[:3], atol=1e-6))
        with self.assertRaisesRegex(ValueError, "image 0 has 3 channels, and data.channels is 5"):
            selfsup.embed(run, self.images, device="cpu")
        grey = train_dict(table, pictures.pixels(48)[..., 0], self.path / "grey")
        self.assertEqual(selfsup.embed(grey, pictures.pixels(4)[..., 0], device="cpu").shape[0], 4)
        floats = pictures.pixels(48)[..., :2] / np.float32(255)
        of_floats = train_dict(table, floats, self.path / "floats", set={"data.range": (0, 1)})
        self.assertEqual(of_floats.recipe["data"]["bits"], 16)
        # A checkpoint is of its run, whose range it has.
        checkpoint = max(Path(self.path, "floats").glob("step-*.safetensors"))
        data = {"data": (floats, self.labels), "held_out": (floats[:8], self.labels[:8])}
        self.assertEqual(*(selfsup.knn(run, k=5, device="cpu", **data) for run in (of_floats, checkpoint)))

    def test_axes_are_set(self):
        channels_first = np.moveaxis(self.images, 3, 1)
        run = train(channels_first, self.path / "first", set={"data.axes": "nchw", "train.epochs": 1})
        other = train(self.images, self.path / "last", set={"train.epochs": 1})
        weights, others = run.backbone(), other.backbone()
        self.assertTrue(all(np.array_equal(weights[name], others[name]) for name in weights))

    def test_files_have_labels(self):
        files = sorted(Path(self.folder, "train").rglob("*.png")), sorted(Path(self.folder, "test").rglob("*.png"))
        run = train((files[0], self.labels), self.path / "listed", held_out=(files[1], self.held_out[1]), set={"train.epochs": 1})
        data = {"data": (files[0], self.labels), "held_out": (files[1], self.held_out[1])}
        self.assertGreater(selfsup.knn(run, k=5, device="cpu", **data)["raw pixels"], 0.9)
        self.assertEqual(sorted(selfsup.linear_probe(run, epochs=2, device="cpu", **data)), ["random init", "trained"])


def train_dict(table, images, out, **words):
    return selfsup.train(table, data=images, out=out, device="cpu", progress=False, **words)


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
