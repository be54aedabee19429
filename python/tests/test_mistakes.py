"""What a caller may get wrong: each case names the call, the exception's class and a part of its sentence."""

import os
import signal
import tempfile
import threading
import time
import unittest
from pathlib import Path

import numpy as np

import pictures
import selfsup

POLICY = {"size": 8, "repeat": 2}
IMAGES = pictures.pixels(8)


def loader(images=IMAGES, recipe=POLICY, batch=4, **words):
    return lambda: selfsup.Loader(images, recipe, batch, **words)


FEATURES = np.eye(4, dtype=np.float32)

CASES = [
    # Images.
    (loader(IMAGES.astype(np.float32)), ValueError, r"images are floats: .*\{\"range\": \(LOW, HIGH\)\}"),
    (loader(IMAGES.astype(np.int64)), TypeError, "uint8, uint16 or floats, not int64"),
    (loader(IMAGES > 9), TypeError, "uint8, uint16 or floats, not bool"),
    (loader(IMAGES[..., :2]), selfsup.Error, r"the images have 2 channels of 8 bits: write pixels = \"float\""),
    (loader(IMAGES[..., :2], reading={"channels": 3}), ValueError, "image 0 has 2 channels, and data.channels is 3"),
    (loader(IMAGES[0]), ValueError, r"an array \[24, 24, 3\] may be one image"),
    (loader(IMAGES[0, 0]), ValueError, r"\[n, height, width\], not \[24, 3\]"),
    (loader(np.moveaxis(IMAGES, 3, 1)), ValueError, r"array \[8, 3, 24, 24\] seems to have its channels first: say reading=\{\"axes\": \"nchw\"\}, or"),
    (loader(list(np.moveaxis(IMAGES, 3, 1))), ValueError, r"image \[3, 24, 24\] seems .* reading=\{\"axes\": \"chw\"\}"),
    (loader(IMAGES, reading={"axes": "chwn"}), ValueError, "axes is 'chwn'"),
    (loader(IMAGES, reading={"axes": "nhw"}), ValueError, r"an array of images is nhw, not \[8, 24, 24, 3\]"),
    (loader(IMAGES, reading={"chanels": 3}), ValueError, "unknown field `chanels`"),
    (loader(IMAGES, reading={"channels": 300}), selfsup.Error, "data.channels is 300"),
    (loader(IMAGES, reading={"range": (0, 9)}), selfsup.Error, "data.range needs data.bits=16"),
    (loader([IMAGES[0], IMAGES[1].astype(np.uint16)]), ValueError, "image 1 has samples of 16 bits: set data.bits=16"),
    (loader([IMAGES[0], IMAGES[1, 0, :, 0]]), ValueError, r"an image is \[height, width, channels\] or \[height, width\], not \[24\]"),
    (loader([IMAGES[0], IMAGES[1, :, :0]]), ValueError, r"not \[24, 0, 3\]"),
    (loader(IMAGES.astype(np.uint16), {"size": 8, "pixels": "float"}, dtype="uint8"), ValueError, "16 bits are no bytes"),
    (loader([]), ValueError, "there are no images"),
    (loader(IMAGES[:0]), ValueError, "there are no images"),
    (loader(labels=[0, 1]), ValueError, "as many labels as images"),
    (loader(labels=[-1] * 8), ValueError, "integers from 0"),
    (loader(labels=np.zeros(8)), ValueError, "integers from 0"),
    (loader("nowhere"), selfsup.Error, "nowhere: no such file or folder"),
    (loader(labels=[0] * 7 + [2**24]), ValueError, "a label is 16777216; labels count classes, and are below 16777216"),
    (loader(labels=[0] * 7 + [2**32 - 1]), ValueError, "a label is 4294967295"),
    (loader([__file__] * 4, labels=[0, 1]), ValueError, "as many labels as images"),
    (loader("nowhere", labels=[0]), TypeError, "labels are those of arrays"),
    (loader(".", split="held-out"), selfsup.Error, "unknown split `held-out`"),
    (loader(["nowhere.png"] * 4, batch=4, threads=1), None, ""),
    # What the views are like.
    (loader(recipe="simclr-cifar"), selfsup.Error, "no recipe file or built-in recipe simclr-cifar"),
    (loader(recipe={"size": 0}), selfsup.Error, "size"),
    (loader(recipe={"size": 8, "flip": 2.0}), selfsup.Error, "flip"),
    (loader(recipe={"size": 8, "flipp": 0.5}), ValueError, "unknown field `flipp`"),
    (loader(recipe={"size": "8"}), ValueError, "a policy of augmentation"),
    (loader(recipe=[]), selfsup.Error, "at least one view"),
    (loader(recipe={**POLICY, "normalise": {"mean": [0, 0, 0], "std": [1, 1, 1]}}, dtype="uint8"), ValueError, "normalise=False"),
    (loader(batch=9), selfsup.Error, "a batch of 9 is larger than the set of 8 images"),
    (loader(batch=0), selfsup.Error, "at least one view and one sample"),
    (loader(batch=-1), OverflowError, "negative"),
    (loader(seed=-1), OverflowError, "negative"),
    (loader(channels="middle"), ValueError, "channels is 'middle'"),
    (loader(dtype="float16"), ValueError, "dtype is 'float16'"),
    (loader(framework="jax"), ValueError, "framework is 'jax'"),
    (loader(framework="dlpack"), ValueError, 'are for a GPU: say which with device="cuda:0"'),
    (loader(gpu_memory=9), ValueError, 'are for a GPU: say which with device="cuda:0"'),
    (loader(device="cuda"), ValueError, r'NumPy has no arrays on cuda: say framework=\"torch\", or \"dlpack\"'),
    (loader(device="cuda", framework="jax"), ValueError, "framework is 'jax'"),
    (loader(device="gpu", framework="dlpack"), selfsup.Error, "unknown device `gpu`: expected cpu, cuda or cuda:N"),
    (loader(device="cuda:x", framework="dlpack"), selfsup.Error, "unknown device `cuda:x`"),
    (loader(device="cuda:9999", framework="dlpack"), selfsup.Error, "NVIDIA driver|no GPU 9999|without CUDA kernels"),
    (loader(device="cuda", framework="dlpack", dtype="uint8"), ValueError, "on a GPU views are float32"),
    (loader(device="cuda", framework="dlpack", contiguous=True), ValueError, "on a GPU views are float32"),
    (lambda: loader()().seek(0, 2), ValueError, "batch 2 of an epoch of 2 batches"),
    (lambda: loader()().seek(2**32 - 1), ValueError, "epoch 4294967295: epochs are below 2147483648"),
    (lambda: loader()().seek(2**32), ValueError, "epochs are below 2147483648"),
    (lambda: selfsup.Views(POLICY)(IMAGES), ValueError, r"an image is \[height, width, channels\]"),
    (lambda: selfsup.Views(POLICY)(IMAGES[0].astype(int)), TypeError, "uint8"),
    (lambda: selfsup.Views(POLICY)(IMAGES[0].astype(np.float64)), ValueError, "images are floats"),
    (lambda: selfsup.Views(POLICY)(IMAGES[0][..., :1]), selfsup.Error, "1 channel of 8 bits"),
    (lambda: selfsup.Views({**POLICY, "pixels": "float"}, reading={"range": (0, 1), "bits": 16})(IMAGES[0] * np.nan), ValueError, "not finite"),
    # Runs.
    (lambda: selfsup.train("demo", set={"train.epoch": 1}), selfsup.Error, "did you mean `epochs`"),
    (lambda: selfsup.train("demo", set={"train.epochs": object()}), TypeError, "a setting is a number"),
    (lambda: selfsup.train({"seed": 1}), selfsup.Error, "missing field"),
    (lambda: selfsup.train("demo", data="nowhere", out=tempfile.mkdtemp(), progress=False), selfsup.Error, "nowhere"),
    (lambda: selfsup.train("demo", out=os.path.dirname(__file__), progress=False, device="cpu"), selfsup.Error, "holds other files"),
    (lambda: selfsup.train("demo", out=tempfile.mkdtemp(), device="gpu", progress=False), selfsup.Error, "unknown device `gpu`"),
    (lambda: selfsup.train("demo", data=IMAGES, out=tempfile.mkdtemp(), held_out=(IMAGES, [0] * 8)), ValueError, "give both as"),
    (lambda: selfsup.train("demo", data="photos", held_out=(IMAGES, [0] * 8)), TypeError, "held_out goes with images in memory"),
    (lambda: selfsup.train("demo", data=(IMAGES, [0, 1])), ValueError, "as many labels as images"),
    (lambda: selfsup.train("demo", data=IMAGES[..., 0]), selfsup.Error, "1 channel"),
    (lambda: selfsup.train("demo", data=IMAGES / np.float32(255)), ValueError, r'with set=\{"data.range": \(LOW, HIGH\)\}$'),
    (lambda: selfsup.train("demo", data=np.moveaxis(IMAGES, 3, 1)), ValueError, r'say set=\{"data.axes": "nchw"\}, or "nhwc" if not'),
    (lambda: selfsup.train("demo", data=IMAGES[0]), ValueError, r'write \[image\], or say set=\{"data.axes": "nhw"\}'),
    (lambda: selfsup.knn("nowhere", data=np.moveaxis(IMAGES, 3, 1)), ValueError, r"move them last, numpy.moveaxis\(images, -3, -1\)"),
    (lambda: selfsup.knn("nowhere", data=IMAGES[0]), ValueError, r"write \[image\], or images\[..., None\]"),
    (lambda: selfsup.knn("nowhere", data=IMAGES / np.float32(255)), ValueError, "images are floats, and the run read none"),
    (lambda: selfsup.knn_accuracy(FEATURES, [0, 1, 2, 2**32 - 1], FEATURES, [0] * 4), ValueError, "a label is 4294967295"),
    (lambda: selfsup.resume("nowhere"), selfsup.Error, "nowhere"),
    (lambda: selfsup.Run("nowhere"), selfsup.Error, "is not the folder of a run"),
    (lambda: selfsup.embed("nowhere", IMAGES), selfsup.Error, "neither a run's folder"),
    (lambda: selfsup.embed(__file__, IMAGES, arch="resnet18"), selfsup.Error, "test_mistakes.py"),
    (lambda: selfsup.embed(__file__, IMAGES, arch="resnet19"), selfsup.Error, "resnet19"),
    (lambda: selfsup.knn("nowhere"), selfsup.Error, "neither a run's folder"),
    (lambda: selfsup.knn("nowhere", k=0), ValueError, "both must be above 0"),
    # Arrays on a GPU, of which NumPy's are none.
    (lambda: selfsup._native.sinkhorn_on_gpu(FEATURES, 0.05, 3, 1), ValueError, "scores is on a device of DLPack's type 1; it must be on a CUDA GPU"),
    (lambda: selfsup._native.sinkhorn_on_gpu([1.0], 0.05, 3, 1), TypeError, "scores is a .*list.*, not an array on a GPU"),
    (lambda: selfsup._native.sinkhorn_on_gpu(FEATURES, 0.05, 3, 0), ValueError, "stream is 0"),
    (lambda: selfsup._native.loss_and_gradients_on_gpu("nt_xent", [], [], 0.5, 1), ValueError, "at least one array"),
    # Features.
    (lambda: selfsup.knn_accuracy(FEATURES, [0, 1], FEATURES, [0, 1, 2, 3]), ValueError, r"features \[4, 4\] with 2 labels"),
    (lambda: selfsup.knn_accuracy(FEATURES, [0] * 4, FEATURES[:, :2], [0] * 4), ValueError, "cannot be compared"),
    (lambda: selfsup.knn_accuracy(FEATURES[0], [0], FEATURES, [0] * 4), ValueError, r"features are \[n, d\], not \[4\]"),
    (lambda: selfsup.knn_accuracy(FEATURES * np.nan, [0] * 4, FEATURES, [0] * 4), selfsup.Error, "NaN"),
    (lambda: selfsup.probe_accuracy(FEATURES, [0] * 4, FEATURES, [0] * 4, per_class=0), ValueError, "above 0"),
]


class Mistakes(unittest.TestCase):
    def test_each_is_named_in_a_sentence(self):
        for i, (call, expected, sentence) in enumerate(CASES):
            with self.subTest(case=i, expected=sentence):
                if expected is None:
                    call()
                    continue
                with self.assertRaises(expected) as raised:
                    call()
                self.assertNotIsInstance(raised.exception, selfsup.Bug)
                self.assertRegex(str(raised.exception), sentence)

    def test_a_panic_is_an_exception_that_asks_for_a_report(self):
        odd, even = np.ones((3, 2), np.float32), np.ones((4, 2), np.float32) / np.sqrt(np.float32(2))
        # `selfsup.torch` checks shapes before: this is the engine's own last check.
        with self.assertRaisesRegex(selfsup.Bug, "please report it.*nt_xent: 3 rows"):
            selfsup._native.loss_and_gradients("nt_xent", [odd], [True], 0.5, 1)
        loss, (gradient,) = selfsup._native.loss_and_gradients("nt_xent", [even], [True], 0.5, 1)
        self.assertAlmostEqual(loss, np.log(3), places=6)
        self.assertEqual(gradient.shape, (4, 2))

    def test_files_that_are_gone(self):
        with tempfile.TemporaryDirectory() as root:
            files = []
            for i, image in enumerate(IMAGES):
                files.append(Path(root, f"{i}.png"))
                files[-1].write_bytes(pictures.png(image))
            loading = selfsup.Loader(files, POLICY, 4)
            files[3].unlink()
            with self.assertRaisesRegex(selfsup.Error, "3.png: No such file"):
                for _ in range(3):
                    for _ in loading:
                        pass
            with self.assertRaisesRegex(selfsup.Error, "the loader has ended"):
                next(iter(loading))
            # A damaged file is replaced, and listed.
            files[3].write_bytes(b"\x89PNG no more")
            loading = selfsup.Loader(files, POLICY, 4)
            for batch in loading:
                self.assertNotIn(3, batch.indices.tolist())
            self.assertEqual([index for index, _ in loading.skipped], [3])

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_a_forked_process_gets_a_sentence_not_a_deadlock(self):
        loading = selfsup.Loader(IMAGES, POLICY, 4)
        next(iter(loading))
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                next(iter(loading))
                said = "no error"
            except selfsup.Error as error:
                said = str(error)
            # What the child makes itself works there.
            own = next(iter(selfsup.Loader(IMAGES, POLICY, 4)))
            del loading
            os.write(write, f"{len(own.views)} views, {said}".encode())
            os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            self.assertRegex(pipe.read(), "2 views, this Loader was made before the process was forked")

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_a_process_forked_while_a_loss_is_computed_computes_its_own(self):
        rows, done = np.eye(600, 64, dtype=np.float32), threading.Event()
        loss = lambda rows: selfsup._native.loss_and_gradients("nt_xent", [rows], [True], 0.5, 1)[0]

        def compute():
            while not done.is_set():
                loss(rows)

        thread = threading.Thread(target=compute)
        thread.start()
        try:
            time.sleep(0.2)
            for _ in range(3):
                child = os.fork()
                if child == 0:
                    signal.alarm(20)  # ends a child that waits for ever
                    loss(rows[:8])
                    os._exit(0)
                self.assertEqual(os.waitpid(child, 0)[1], 0)
        finally:
            done.set()
            thread.join()

    def test_ctrl_c_ends_a_wait_for_images(self):
        pictures.hear_ctrl_c(self)
        with tempfile.TemporaryDirectory() as root:
            # A pipe that nobody writes to: a read of it never returns.
            files = [Path(root, f"{i}.png") for i in range(4)]
            for file in files:
                os.mkfifo(file)
            loading = selfsup.Loader(files, POLICY, 4, threads=1)
            threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            with self.assertRaises(KeyboardInterrupt):
                next(iter(loading))


if __name__ == "__main__":
    unittest.main()
