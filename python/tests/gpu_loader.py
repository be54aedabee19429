"""Views that a GPU makes: those of the CPU, in any layout, at any place of an epoch, and in the order of the consumer's stream."""

import ctypes
import unittest

import numpy as np

import cuda
import pictures
import selfsup

POLICY = {
    "size": 16,
    "repeat": 2,
    "flip": 0.5,
    "grey": 0.2,
    "blur": {"p": 0.5, "sigma": [0.1, 2.0]},
    "jitter": {"p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
}


class Loading(cuda.TestCase):
    def loader(self, gpu=True, count=13, **words):
        how = {"device": "cuda:0", "framework": "dlpack"} if gpu else {}
        words = {"batch": 4, "seed": 7, "threads": 2, "labels": [i % 3 for i in range(count)], **how, **words}
        return selfsup.Loader(words.pop("images", pictures.pixels(count)), words.pop("recipe", POLICY), **words)

    def compare(self, batches, want, exact=True):
        """Of batches on the GPU and on the CPU; reads those of the GPU."""
        batches, want = list(batches), list(want)
        self.assertEqual(len(batches), len(want))
        for a, b in zip(batches, want):
            self.assertEqual((a.epoch, a.position), (b.epoch, b.position))
            np.testing.assert_array_equal(a.indices, b.indices)
            np.testing.assert_array_equal(a.labels, b.labels)
            self.assertEqual(len(a.views), len(b.views))
            for made, view in zip(a.views, b.views):
                self.assertEqual(tuple(made.shape), view.shape)
                got = self.gpu.read(made)
                if exact:
                    np.testing.assert_array_equal(got, view)
                else:
                    np.testing.assert_allclose(got, view, atol=2e-5)

    def test_the_views_are_those_of_the_cpu_to_the_bit(self):
        for words in ({}, {"channels": "last"}, {"recipe": [POLICY, {"size": 8, "repeat": 3}]}):
            with self.subTest(words):
                on_gpu, on_cpu = self.loader(**words), self.loader(gpu=False, **words)
                for _ in range(2):
                    self.compare(on_gpu, on_cpu)

    def test_a_window_into_four_channels(self):
        for channels, strides in (("first", [16 * 16 * 4, 1, 16 * 4, 4]), ("last", [16 * 16 * 4, 16 * 4, 4, 1])):
            view = next(iter(self.loader(channels=channels))).views[1]
            with cuda.Taken(self.gpu, view) as taken:
                self.assertEqual(taken.strides, strides)

    def test_a_set_that_does_not_fit_is_uploaded_batch_by_batch(self):
        self.compare(self.loader(gpu_memory=0), self.loader(gpu=False))
        self.compare(self.loader(gpu_memory=1 << 20), self.loader(gpu=False))

    def test_normalised_views_and_images_of_other_channels(self):
        normalised = {**POLICY, "normalise": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}}
        self.compare(self.loader(recipe=normalised), self.loader(gpu=False, recipe=normalised), exact=False)
        floats = {"size": 16, "repeat": 2, "pixels": "float", "flip": 0.5, "noise": {"p": 0.5, "std": [0.01, 0.1]}}
        images = np.random.default_rng(1).integers(0, 1 << 16, (13, 20, 20, 5)).astype(np.uint16)
        words = {"recipe": floats, "images": images}
        self.compare(self.loader(**words), self.loader(gpu=False, **words), exact=False)

    def test_it_goes_on_in_the_middle_of_an_epoch(self):
        whole = self.loader(gpu=False)
        want = [b for _ in range(2) for b in whole]
        stopped = self.loader()
        for _ in range(4):
            next(iter(stopped))
        # A state of either device continues on the other.
        resumed = self.loader()
        resumed.load_state_dict(stopped.state_dict())
        self.compare(resumed, want[4:])
        on_cpu = self.loader(gpu=False)
        on_cpu.load_state_dict(stopped.state_dict())
        self.compare(stopped, on_cpu)
        resumed.seek(0, 1)
        self.compare(resumed, want[1:3])

    def test_views_are_ready_in_the_consumers_stream_and_outlive_the_loader(self):
        want = [view.copy() for batch in self.loader(gpu=False) for view in batch.views]
        for seed in range(1, 6):
            cuda.stand_in("seed", ctypes.c_uint64(seed))
            loader, copies = self.loader(), []
            for batch in loader:
                for view in batch.views:
                    # Given back at once: the memory serves later batches, which wait for this copy.
                    with cuda.Taken(self.gpu, view) as taken:
                        copies.append((taken, *taken.copy()))
                del batch, view
            kept = next(iter(loader)).views
            taken = [cuda.Taken(self.gpu, view) for view in kept]
            del loader, kept
            for (taken_first, to, count), view in zip(copies, want):
                np.testing.assert_array_equal(taken_first.strided(self.gpu.download(to, count)), view)
                self.gpu.free(to)
            for view in taken:
                self.assertTrue(np.isfinite(view.numpy()).all())
                view.give_back()

    def test_images_that_cannot_be_read_are_replaced(self):
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as root:
            files = []
            for i, image in enumerate(pictures.pixels(8)):
                files.append(Path(root, f"{i}.png"))
                files[-1].write_bytes(pictures.png(image) if i != 3 else b"\x89PNG no more")
            words = {"images": files, "labels": None}
            loaders = self.loader(**words), self.loader(gpu=False, **words)
            self.compare(*loaders)
            self.assertEqual([index for index, _ in loaders[0].skipped], [3])


class Mistakes(cuda.TestCase):
    def test_each_is_named_in_a_sentence(self):
        images = pictures.pixels(8)
        for words, expected, sentence in (
            ({"device": "cuda:5"}, selfsup.Error, "there is no GPU 5: the driver reports GPUs 0 to 1"),
            ({"device": "cuda:-1"}, selfsup.Error, "unknown device `cuda:-1`"),
            ({"gpu_memory": -1}, OverflowError, "negative"),
            ({"contiguous": True}, ValueError, "leave dtype and contiguous as they are"),
        ):
            with self.subTest(sentence), self.assertRaisesRegex(expected, sentence):
                selfsup.Loader(images, POLICY, 4, **{"device": "cuda", "framework": "dlpack", **words})

    def test_a_gpu_that_fails_is_an_error(self):
        loader = selfsup.Loader(pictures.pixels(8), POLICY, 4, device="cuda", framework="dlpack")
        next(iter(loader))
        cuda.driver().standin_fail.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint32]
        cuda.driver().standin_fail(b"cuLaunchKernel", 1, 2)
        with self.assertRaisesRegex(selfsup.Error, "launch of augment_f32.*OUT_OF_MEMORY"):
            for _ in range(3):
                for _ in loader:
                    pass
        del loader
        cuda.stand_in("recover")


if __name__ == "__main__":
    unittest.main()
