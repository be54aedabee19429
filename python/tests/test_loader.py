import pickle
import random
import signal
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import numpy as np

import pictures
import selfsup

try:
    from PIL import Image
except ImportError:
    Image = None

POLICY = {
    "size": 16,
    "repeat": 2,
    "flip": 0.5,
    "grey": 0.2,
    "jitter": {"p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
}


def digest(batches):
    """All that a loader hands out, without the arrays' memory."""
    return [(b.epoch, b.position, b.indices.tolist(), b[1].tolist(), [np.asarray(v).tobytes() for v in b[0]]) for b in batches]


class Loading(unittest.TestCase):
    def loader(self, count=23, **words):
        words = {"batch": 5, "seed": 7, "threads": 2, "labels": [i % 3 for i in range(count)], **words}
        return selfsup.Loader(pictures.pixels(count), words.pop("recipe", POLICY), **words)

    def test_an_epoch_is_a_loop_over_views_and_labels(self):
        loader = self.loader()
        seen = []
        for views, labels in loader:
            self.assertEqual([v.shape for v in views], [(5, 3, 16, 16)] * 2)
            self.assertEqual((views[0].dtype, labels.dtype, labels.shape), (np.float32, np.int64, (5,)))
            self.assertTrue(0 <= views[0].min() and views[0].max() <= 1)
            self.assertFalse(np.array_equal(views[0], views[1]))
            seen.append(labels)
        self.assertEqual((len(seen), len(loader)), (4, 4))
        indices = [i for batch in loader for i in batch.indices]
        self.assertEqual(len(set(indices)), 20)
        self.assertEqual((loader.images, loader.classes), (23, ["0", "1", "2"]))

    def test_labels_are_those_of_the_indices(self):
        for batch in self.loader():
            self.assertEqual([i % 3 for i in batch.indices], batch.labels.tolist())

    def test_views_do_not_depend_on_threads(self):
        runs = [digest([b for _ in range(2) for b in self.loader(threads=threads)]) for threads in (1, 3)]
        self.assertEqual(*runs)
        self.assertNotEqual(digest(self.loader()), digest(self.loader(seed=8)))

    def test_two_epochs_differ(self):
        loader = self.loader()
        first, second = digest(loader), digest(loader)
        self.assertNotEqual([b[2] for b in first], [b[2] for b in second])
        self.assertEqual([b[0] for b in second], [1] * 4)

    def test_a_loader_goes_on_in_the_middle_of_an_epoch(self):
        whole = self.loader()
        batches = [b for _ in range(2) for b in whole]
        stopped = self.loader()
        for _ in range(4):
            next(iter(stopped))
        for taken, batch in zip(range(2), stopped):
            self.assertEqual((batch.epoch, batch.position), (1, taken))
        resumed = self.loader(threads=1)
        resumed.load_state_dict(stopped.state_dict())
        self.assertEqual(digest(resumed), digest(batches[6:]))
        # What was left with `break` goes on, too.
        self.assertEqual(digest(stopped), digest(batches[6:]))
        with self.assertRaisesRegex(ValueError, "seed 7, and this one has 8"):
            self.loader(seed=8).load_state_dict(stopped.state_dict())
        with self.assertRaisesRegex(ValueError, "batch 4 of an epoch of 4 batches"):
            self.loader().seek(0, 4)

    @unittest.skipUnless(hasattr(signal, "setitimer"), "needs timers")
    def test_the_exception_of_a_signal_loses_no_batch(self):
        class Alarm(Exception):
            pass

        def hear(*_):
            raise Alarm

        self.addCleanup(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, hear))
        draw, interrupted, seen = random.Random(1), 0, []
        loader = selfsup.Loader(pictures.pixels(64, size=64), {"size": 64, "repeat": 4, "flip": 0.5}, 8, threads=1)
        while len(seen) < 40 or not interrupted:
            try:
                try:
                    # Later and later, so that a slow machine has the time for a batch.
                    signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0002, 0.005 + 0.0005 * interrupted))
                    for batch in loader:
                        seen.append((batch.epoch, batch.position))
                        break
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Alarm:
                interrupted += 1
        self.assertEqual(seen, [(i // 8, i % 8) for i in range(len(seen))])
        # One that comes when the engine has handed out a batch.
        native, loader._native = loader._native, mock.Mock(wraps=loader._native)
        loader._native.next.side_effect = lambda: (native.next(), hear())
        with self.assertRaises(Alarm):
            next(iter(loader))
        loader._native = native
        state = loader.state_dict()
        batch = next(iter(loader))
        self.assertEqual((batch.epoch, batch.position), (state["epoch"], state["position"]))

    def test_files_have_labels(self):
        images, labels = pictures.pixels(8), [0, 1] * 4
        with tempfile.TemporaryDirectory() as root:
            files = [Path(root, f"{i}.png") for i in range(8)]
            for file, image in zip(files, images):
                file.write_bytes(pictures.png(image))
            of_files, of_arrays = (selfsup.Loader(given, POLICY, 4, labels=labels) for given in (files, images))
            self.assertEqual(digest(of_files), digest(of_arrays))
            self.assertEqual(of_files.classes, of_arrays.classes)

    def test_numbers_of_numpy_are_settings(self):
        policy = {**POLICY, "size": np.int64(16), "flip": np.float32(0.5), "jitter": {**POLICY["jitter"], "p": np.float64(0.8)}}
        self.assertEqual(digest(self.loader(recipe=policy)), digest(self.loader()))
        floats = pictures.pixels(8).astype(np.float32)
        policy = {"size": 16, "pixels": "float"}
        readings = {"range": (floats.min(), floats.max())}, {"range": (float(floats.min()), float(floats.max()))}
        self.assertEqual(*(digest(selfsup.Loader(floats, policy, 8, reading=reading)) for reading in readings))
        self.assertEqual(*(selfsup.Views(policy, reading=reading)(floats[0], seed=1)[0].tobytes() for reading in readings))

    def test_layouts_and_types_hold_the_same_values(self):
        plain = next(iter(self.loader()))[0]
        for words in ({"contiguous": True}, {"channels": "last"}, {"channels": "last", "contiguous": True}):
            for own, other in zip(plain, next(iter(self.loader(**words)))[0]):
                if words.get("channels") == "last":
                    other = np.moveaxis(other, 3, 1)
                self.assertTrue(np.array_equal(own, other), words)
        packed = next(iter(self.loader(contiguous=True)))[0][0]
        self.assertTrue(packed.flags.c_contiguous and packed.flags.writeable)
        for channels in ("first", "last"):
            for own, other in zip(plain, next(iter(self.loader(dtype="uint8", channels=channels)))[0]):
                other = np.moveaxis(other, 3, 1) if channels == "last" else other
                self.assertEqual(other.dtype, np.uint8)
                self.assertTrue(np.array_equal(own, other.astype(np.float32) / np.float32(255)))

    def test_views_outlive_the_loader_and_are_not_reused(self):
        loader = self.loader()
        kept = next(iter(loader))[0][0]
        copy = kept.copy()
        for _ in range(3):
            for views, _ in loader:
                self.assertFalse(np.shares_memory(views[0], kept))
        del loader
        self.assertTrue(np.array_equal(kept, copy))
        kept[:] = 2.0  # the caller's own

    def test_no_copy_lies_between_views_and_engine(self):
        view = next(iter(self.loader()))[0][0]
        self.assertEqual(view.strides, (16 * 16 * 16, 4, 16 * 16, 16))
        self.assertTrue(np.shares_memory(np.from_dlpack(view), view))

    def test_crops_of_several_sizes_come_in_the_order_of_the_policies(self):
        policies = [{"size": 8}, {"size": 16}, {"size": 8, "repeat": 2}]
        views, _ = next(iter(self.loader(recipe=policies)))
        self.assertEqual([v.shape[-1] for v in views], [8, 16, 8, 8])

    def test_recipes_give_the_views_of_their_method(self):
        for name, count in (("simclr-cifar10-small", 2), ("swav-cifar10-small", None)):
            views, _ = next(iter(self.loader(recipe=name)))
            self.assertEqual(len(views), count or len(views))
            table = selfsup.recipe(name)
            again, _ = next(iter(self.loader(recipe=table)))
            self.assertTrue(all(np.array_equal(a, b) for a, b in zip(views, again)))

    def test_images_come_as_folders_files_and_arrays(self):
        with tempfile.TemporaryDirectory() as root:
            path = pictures.folder(root)
            loader = selfsup.Loader(path, POLICY, 8, threads=1)
            self.assertEqual((loader.images, loader.classes, len(loader)), (48, ["across", "down"], 6))
            self.assertEqual(selfsup.Loader(path, POLICY, 8, split="test").images, 16)
            train = sorted(Path(path, "train").rglob("*.png"))
            arrays = selfsup.Loader([pictures.pixels(48)[int(p.stem)] for p in train], POLICY, 8, threads=1)
            files = selfsup.Loader(train, POLICY, 8, threads=1)
            for one, two, three in zip(loader, arrays, files):
                for a, b, c in zip(one[0], two[0], three[0]):
                    self.assertTrue(np.array_equal(a, b) and np.array_equal(a, c))
                self.assertEqual(two[1].tolist(), [-1] * 8)

    def test_arrays_are_read_where_they_lie(self):
        images = pictures.pixels(8)
        images.flags.writeable = False
        loader = selfsup.Loader(images, {"size": 24, "area": [1.0, 1.0], "aspect": [1.0, 1.0]}, 8, channels="last", dtype="uint8")
        batch = next(iter(loader))
        self.assertTrue(np.array_equal(batch.views[0], images[batch.indices]))

    def test_arrays_of_any_channels_and_bits_are_read_as_they_are(self):
        whole = {"size": 24, "area": [1.0, 1.0], "aspect": [1.0, 1.0], "pixels": "float"}
        draw = np.random.default_rng(4)
        for channels in (1, 2, 3, 4, 8, 11):
            for dtype, most in ((np.uint8, 255), (np.uint16, 65535)):
                images = draw.integers(0, most + 1, (6, 24, 24, channels)).astype(dtype)
                given = [images, list(images), images.astype(images.dtype.newbyteorder("S"))]
                given += [images[..., 0], list(images[..., 0])] if channels == 1 else []
                for form in given:
                    for words in ({}, {"contiguous": True}, {"channels": "first"}):
                        loader = selfsup.Loader(form, whole, 3, **{"channels": "last", **words})
                        batch = next(iter(loader))
                        view = np.moveaxis(batch.views[0], 1, 3) if words.get("channels") else batch.views[0]
                        self.assertEqual(view.shape, (3, 24, 24, channels))
                        want = images[batch.indices] / np.float64(most)
                        self.assertLess(np.abs(view - want).max(), 2e-6, (channels, dtype, words))
                if dtype == np.uint8:
                    batch = next(iter(selfsup.Loader(images, whole, 3, channels="last", dtype="uint8")))
                    self.assertTrue(np.array_equal(batch.views[0], images[batch.indices]))

    def test_a_range_says_what_is_black_and_white(self):
        whole = {"size": 24, "area": [1.0, 1.0], "aspect": [1.0, 1.0], "pixels": "float"}
        images = np.random.default_rng(5).uniform(-2, 3, (6, 24, 24, 2))
        low, high = -1.0, 2.5
        for dtype in (np.float32, np.float64, np.float16):
            given = images.astype(dtype)
            batch = next(iter(selfsup.Loader(given, whole, 3, channels="last", reading={"range": (low, high)})))
            want = np.clip((given[batch.indices].astype(np.float64) - low) / (high - low), 0, 1)
            # Floats become 16 bits.
            self.assertLess(np.abs(batch.views[0] - want).max(), 1 / 65535, dtype)
        twelve = np.random.default_rng(6).integers(0, 4096, (6, 24, 24, 1)).astype(np.uint16)
        batch = next(iter(selfsup.Loader(twelve, whole, 3, channels="last", reading={"range": (0, 4095)})))
        self.assertLess(np.abs(batch.views[0] - twelve[batch.indices] / 4095).max(), 1 / 65535)
        broken = images.astype(np.float32)
        broken[2, 5, 5, 1] = np.nan
        loader = selfsup.Loader(broken, whole, 3, reading={"range": (low, high)})
        for batch in loader:
            self.assertNotIn(2, batch.indices)
        self.assertRegex(loader.skipped[0][1], "image 2: has 1 samples that are not finite")

    def test_arrays_need_not_be_aligned(self):
        policy = {"size": 16, "pixels": "float"}
        images = np.random.default_rng(10).integers(0, 65536, (4, 20, 20, 2)).astype(np.uint16)
        for dtype, reading in ((np.uint16, {}), (np.uint16, {"range": (10, 60000)}), (np.float32, {"range": (10, 60000)})):
            given = images.astype(dtype)
            odd = np.frombuffer(b"." + given.tobytes(), dtype=dtype, offset=1).reshape(given.shape)
            self.assertFalse(odd.flags.aligned)
            want, got = (digest(selfsup.Loader(array, policy, 2, reading=reading)) for array in (given, odd))
            self.assertEqual(got, want)

    def test_axes_of_arrays_are_as_said(self):
        images = pictures.pixels(6)
        policy = {"size": 16, "repeat": 1}
        want = next(iter(selfsup.Loader(images, policy, 6))).views[0]
        first = np.moveaxis(images, 3, 1)
        for given, axes in ((first, "nchw"), (first, "chw"), (list(first), "chw"), (images, "nhwc"), (list(images), "hwc")):
            got = next(iter(selfsup.Loader(given, policy, 6, reading={"axes": axes}))).views[0]
            self.assertTrue(np.array_equal(got, want), axes)
        # Three channels of grey are what a file of one channel gives in RGB.
        grey = images[..., :1]
        want = next(iter(selfsup.Loader(np.repeat(grey, 3, axis=3), policy, 6))).views[0]
        got = next(iter(selfsup.Loader(grey[..., 0], policy, 6, reading={"channels": 3}))).views[0]
        self.assertTrue(np.array_equal(got, want))

    def test_files_of_any_channels_and_bits_give_what_arrays_do(self):
        policy = {"size": 16, "repeat": 2, "pixels": "float", "flip": 0.5}
        draw = np.random.default_rng(7)
        bands = draw.integers(0, 65536, (6, 20, 22, 4)).astype(np.uint16)
        grey = draw.integers(0, 65536, (6, 20, 22, 1)).astype(np.uint16)
        floats = draw.uniform(0, 1, (6, 20, 22, 2)).astype(np.float32)
        stacks = draw.integers(0, 256, (6, 20, 22, 5)).astype(np.uint8)
        for name, images, write, reading in (
            ("bands.tiff", bands, pictures.tiff, {"channels": 4, "bits": 16}),
            ("grey.png", grey, pictures.png, {"channels": 1, "bits": 16}),
            ("floats.tif", floats, pictures.tiff, {"channels": 2, "bits": 16, "range": (0.1, 0.9)}),
            ("stacks.npy", stacks, None, {"channels": 5, "axes": "hwc"}),
        ):
            with tempfile.TemporaryDirectory() as root:
                files = [Path(root, f"{i}-{name}") for i in range(6)]
                for file, image in zip(files, images):
                    np.save(file, image) if write is None else file.write_bytes(write(image))
                want = digest(selfsup.Loader(images, policy, 3, reading=reading))
                for given in (root, files):
                    self.assertEqual(digest(selfsup.Loader(given, policy, 3, reading=reading)), want, name)
                if name in ("bands.tiff", "grey.png"):
                    extent = (int(images.min()), int(images.max()))
                    scaled = selfsup.Loader(images, policy, 3, reading={**reading, "range": extent})
                    self.assertEqual(digest(selfsup.Loader(root, policy, 3, reading="native")), digest(scaled), name)
                # A recipe says itself how its images are read.
                recipe = selfsup.recipe("simclr-cifar10-small")
                recipe["augment"] = [policy]
                recipe["data"].update(reading)
                self.assertEqual(digest(selfsup.Loader(root, recipe, 3)), want, name)

    def test_several_images_of_a_file(self):
        policy = {"size": 16, "pixels": "float"}
        images = np.random.default_rng(8).integers(0, 256, (7, 20, 20)).astype(np.uint8)
        with tempfile.TemporaryDirectory() as root:
            np.save(Path(root, "stack.npy"), images)
            reading = {"channels": 1, "axes": "nhw"}
            for given in (root, Path(root, "stack.npy"), [Path(root, "stack.npy")]):
                loader = selfsup.Loader(given, policy, 7, reading=reading)
                self.assertEqual(digest(loader), digest(selfsup.Loader(images, policy, 7)))

    @unittest.skipUnless(Image, "needs Pillow")
    def test_pillow_images_are_photos_or_as_they_are(self):
        whole = {"size": 24, "area": [1.0, 1.0], "aspect": [1.0, 1.0], "pixels": "float"}
        view = lambda images, **words: next(iter(selfsup.Loader(images, whole, len(images), channels="last", **words)))
        photos = pictures.pixels(4)
        grey = [Image.fromarray(image[..., 0]) for image in photos]
        batch = view([Image.fromarray(photos[0]), *grey[1:]])
        self.assertEqual(batch.views[0].shape[-1], 3)
        one = view(grey, reading={"channels": 1})
        self.assertTrue(np.array_equal(one.views[0], view(photos[..., :1]).views[0]))
        four = view([Image.fromarray(image).convert("RGBA") for image in photos], reading={"channels": 4})
        self.assertTrue((four.views[0][..., 3] == 1).all())
        deep = np.random.default_rng(11).integers(0, 65536, (4, 24, 24)).astype(np.uint16)
        want = view(deep).views[0]
        self.assertTrue(np.array_equal(view([Image.fromarray(image) for image in deep]).views[0], want))
        self.assertTrue(np.array_equal(view([Image.fromarray(image.astype(np.int32)) for image in deep]).views[0], want))
        floats = [Image.fromarray(image.astype(np.float32)) for image in deep]
        self.assertTrue(np.array_equal(view(floats, reading={"range": (0, 65535)}).views[0], want))
        with self.assertRaisesRegex(ValueError, "not within 0 to 65535"):
            view([Image.fromarray(image.astype(np.int32) - 70000) for image in deep])

    def test_the_interpreter_is_free_while_a_batch_is_waited_for(self):
        count = 0
        done = threading.Event()

        def counting():
            nonlocal count
            while not done.is_set():
                count += 1

        images = pictures.pixels(64, size=256)
        thread = threading.Thread(target=counting)
        thread.start()
        before = count
        for _ in selfsup.Loader(images, {**POLICY, "size": 224}, 32, threads=1):
            pass
        done.set()
        thread.join()
        self.assertGreater(count - before, 1000)


class OneImage(unittest.TestCase):
    def test_views_of_one_image(self):
        image = pictures.pixels(1)[0]
        views = selfsup.Views(POLICY)
        random.seed(3)
        first, second = views(image), views(image)
        random.seed(3)
        again = views(image)
        self.assertEqual([v.shape for v in first], [(3, 16, 16)] * 2)
        self.assertTrue(all(np.array_equal(a, b) for a, b in zip(first, again)))
        self.assertFalse(np.array_equal(first[0], second[0]))
        sent = pickle.loads(pickle.dumps(views))
        self.assertTrue(np.array_equal(sent(image, seed=5)[1], views(image, seed=5)[1]))
        last = selfsup.Views(POLICY, channels="last")(image, seed=5)
        self.assertTrue(np.array_equal(np.moveaxis(last[0], 2, 0), views(image, seed=5)[0]))

    def test_views_of_other_images_than_photos(self):
        policy = {"size": 16, "repeat": 2, "pixels": "float", "channel_drop": 0.5}
        image = np.random.default_rng(9).integers(0, 65536, (30, 20, 5)).astype(np.uint16)
        views = selfsup.Views(policy)
        first = views(image, seed=1)
        self.assertEqual([v.shape for v in first], [(5, 16, 16)] * 2)
        again = pickle.loads(pickle.dumps(views))(np.moveaxis(image, 2, 0).copy().transpose(1, 2, 0), seed=1)
        self.assertTrue(all(np.array_equal(a, b) for a, b in zip(first, again)))
        ranged = selfsup.Views(policy, reading={"range": (0.0, 1.0)})
        unit = (image / 65535).astype(np.float32)
        self.assertTrue(all(np.abs(a - b).max() < 2e-5 for a, b in zip(ranged(unit, seed=1), first)))
        one = selfsup.Views({**policy, "channel_drop": 0})
        self.assertEqual(one(image[:, :, 0])[0].shape, (1, 16, 16))
        self.assertEqual(one(image[:, :, 0], seed=2)[0].tobytes(), one(image[:, :, :1], seed=2)[0].tobytes())


if __name__ == "__main__":
    unittest.main()
