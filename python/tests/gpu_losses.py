"""Losses over arrays on a GPU, by DLPack: values and gradients, order of the two streams, and whose memory is whose."""

import ctypes
import os
import threading
import unittest

import numpy as np

import cuda
import selfsup

native = selfsup._native


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def log_sum_exp(x):
    most = x.max(1, keepdims=True)
    return np.log(np.exp(x - most).sum(1)) + most[:, 0]


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def nt_xent(t, z):
    n = len(z)
    logits = z @ z.T / t
    np.fill_diagonal(logits, -np.inf)
    positive = np.roll(np.arange(n), n // 2)
    loss = (log_sum_exp(logits) - logits[np.arange(n), positive]).mean()
    d = softmax(logits)
    d[np.arange(n), positive] -= 1
    return loss, [(d + d.T) @ z / (n * t)]


def info_nce(t, q, k, queue):
    logits = np.concatenate([(q * k).sum(1, keepdims=True), q @ queue.T], 1) / t
    loss = (log_sum_exp(logits) - logits[:, 0]).mean()
    d = softmax(logits)
    d[:, 0] -= 1
    d /= len(q) * t
    return loss, [d[:, :1] * k + d[:, 1:] @ queue, d[:, :1] * q]


def neg_cosine(_, p, z):
    size = [np.linalg.norm(x, axis=1, keepdims=True) for x in (p, z)]
    a, b = p / size[0], z / size[1]
    cosine = (a * b).sum(1, keepdims=True)
    return -cosine.mean(), [-(b - cosine * a) / size[0] / len(p), -(a - cosine * b) / size[1] / len(p)]


def soft_cross_entropy(t, scores, targets):
    logits = scores / t
    loss = (log_sum_exp(logits) - (targets * logits).sum(1)).mean()
    return loss, [(softmax(logits) - targets) / (len(scores) * t)]


def sinkhorn(scores, epsilon, iterations):
    q = np.exp((scores - scores.max()) / epsilon).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


REFERENCES = {"nt_xent": nt_xent, "info_nce": info_nce, "neg_cosine": neg_cosine, "soft_cross_entropy": soft_cross_entropy}


def cases():
    """Name, temperature, arrays in f64 that f32 holds exactly, and for which of them a gradient is wanted."""
    rng = np.random.default_rng(3)

    def exact(x):
        return x.astype(np.float32).astype(np.float64)

    def rows(n, d):
        return exact(rng.standard_normal((n, d)))

    def units(n, d):
        return exact(unit(rng.standard_normal((n, d))))

    for n, d, t in ((4, 1, 0.5), (6, 17, 0.5), (34, 33, 0.1), (130, 129, 0.02)):
        yield "nt_xent", t, [units(n, d)], [True]
    for n, d, m, t in ((1, 3, 1, 0.5), (5, 17, 131, 0.2), (33, 65, 7, 0.07)):
        for wanted in ([True, True, False], [True, False, False]):
            yield "info_nce", t, [units(n, d), units(n, d), units(m, d)], wanted
    for n, d in ((1, 1), (9, 17), (33, 130)):
        for wanted in ([True, True], [True, False]):
            yield "neg_cosine", 1.0, [rows(n, d), rows(n, d)], wanted
    for n, k in ((1, 2), (9, 17), (40, 301)):
        yield "soft_cross_entropy", 0.1, [rows(n, k), exact(softmax(rows(n, k)))], [True, False]


class Losses(cuda.TestCase):
    def computed(self, name, t, arrays, wanted):
        given = [self.gpu.array(x.astype(np.float32)) for x in arrays]
        loss, gradients = native.loss_and_gradients_on_gpu(name, given, wanted, t, self.gpu.stream.value)
        for array in given:
            self.assertEqual(array.given_back, 1, "the deleter is called once")
            self.assertEqual(array.asked_with, self.gpu.stream.value)
        return given, loss, gradients

    def assert_close(self, got, want, tolerance, what):
        self.assertEqual(got.shape, want.shape, what)
        scale = max(np.linalg.norm(want), 1e-3)
        self.assertLess(np.linalg.norm(got.astype(np.float64) - want) / scale, tolerance, what)

    def test_values_and_gradients_are_those_of_numpy_and_of_the_cpu(self):
        for name, t, arrays, wanted in cases():
            what = f"{name} {[x.shape for x in arrays]} {t} {wanted}"
            want, want_gradients = REFERENCES[name](t, *arrays)
            on_cpu = native.loss_and_gradients(name, [x.astype(np.float32) for x in arrays], wanted, t, 1)
            given, loss, gradients = self.computed(name, t, arrays, wanted)
            value = self.gpu.read(loss)
            self.assertEqual(value.shape, (), what)
            self.assertLess(abs(value - want), 1e-5 * max(1.0, abs(want)), what)
            self.assertLess(abs(value - on_cpu[0]), 1e-5 * max(1.0, abs(want)), what)
            for i, gradient in enumerate(gradients):
                self.assertEqual(gradient is not None, wanted[i], what)
                if gradient is not None:
                    got = self.gpu.read(gradient, versioned=i == 0)
                    self.assert_close(got, want_gradients[i], 3e-5, what)
                    self.assert_close(got, on_cpu[1][i].astype(np.float64), 3e-5, what)
            for array in given:
                self.assertTrue(array.is_overwritten(), what)
                array.free()

    def test_assignments_are_those_of_numpy_and_of_the_cpu(self):
        for shape in ((1, 1), (7, 5), (33, 130)):
            scores = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
            given = self.gpu.array(scores)
            got = self.gpu.read(native.sinkhorn_on_gpu(given, 0.05, 3, self.gpu.stream.value))
            self.assert_close(got, sinkhorn(scores.astype(np.float64), 0.05, 3), 1e-5, shape)
            self.assert_close(got, native.sinkhorn(scores, 0.05, 3, 1).astype(np.float64), 1e-5, shape)
            self.assertEqual(given.given_back, 1)
            given.free()

    def test_memory_of_any_alignment_and_capsules_of_either_version(self):
        z = unit(np.random.default_rng(2).standard_normal((6, 17))).astype(np.float32)
        want = native.loss_and_gradients("nt_xent", [z], [True], 0.5, 1)
        one_row = np.ones((1, 2), np.float32)
        for how in ({"offset": 4}, {"offset": 8, "versioned": True}, {"null_strides": True}):
            given = self.gpu.array(z, **how)
            loss, (gradient,) = native.loss_and_gradients_on_gpu("nt_xent", [given], [True], 0.5, self.gpu.stream.value)
            self.assertAlmostEqual(float(self.gpu.read(loss)), want[0], places=5)
            self.assert_close(self.gpu.read(gradient), want[1][0].astype(np.float64), 3e-5, how)
            self.assertEqual(given.given_back, 1)
        # The stride of a single row is never used.
        given = self.gpu.array(one_row, strides=[77, 1])
        self.assertEqual(self.gpu.read(native.sinkhorn_on_gpu(given, 0.05, 3, self.gpu.stream.value)).sum(), 1)


class Order(cuda.TestCase):
    def test_the_host_never_waits_and_each_stream_waits_for_the_other(self):
        z = unit(np.random.default_rng(2).standard_normal((6, 17))).astype(np.float32)
        want, _ = nt_xent(0.5, z.astype(np.float64))
        for seed, legacy in [(seed, legacy) for seed in range(1, 9) for legacy in (False, True)]:
            cuda.stand_in("seed", ctypes.c_uint64(seed))
            gpu = cuda.Gpu(legacy=legacy)
            given = gpu.array(z)
            cuda.stand_in("reset_counts")
            loss, (gradient,) = native.loss_and_gradients_on_gpu("nt_xent", [given], [True], 0.5, gpu.stream.value)
            taken = cuda.Taken(gpu, loss)
            to, count = taken.copy()
            # Memory that is given back serves the next calls, which may not overwrite what the copy above reads later.
            taken.give_back()
            del loss, gradient
            for other in [gpu.array(2 * z) for _ in range(3)]:
                native.loss_and_gradients_on_gpu("neg_cosine", [other, gpu.array(z)], [True, True], 1.0, gpu.stream.value)
            self.assertEqual(self.count("waits"), 0)
            self.assertAlmostEqual(float(gpu.download(to, count)[0]), want, places=5, msg=(seed, legacy))
            gpu.free(to)
            gpu.close()

    def test_memory_is_kept_as_long_as_someone_has_it_and_no_longer(self):
        z = unit(np.random.default_rng(2).standard_normal((6, 17))).astype(np.float32)

        def computed():
            return native.loss_and_gradients_on_gpu("nt_xent", [self.gpu.array(z)], [True], 0.5, self.gpu.stream.value)

        loss, (gradient,) = computed()
        self.assertEqual(gradient.shape, [6, 17])
        self.assertRegex(repr(gradient), r"selfsup array \[6, 17\] of float32 on cuda:0")
        want = self.gpu.read(gradient)
        first, second = cuda.Taken(self.gpu, gradient), cuda.Taken(self.gpu, gradient, versioned=False)
        unused = gradient.__dlpack__(stream=1)
        self.assertEqual(first.at, second.at)
        del gradient, loss
        second.give_back()
        del unused
        for _ in range(3):
            computed()
        np.testing.assert_array_equal(first.numpy(), want)
        first.give_back()
        before = cuda.stand_in("live_allocations")
        given = [self.gpu.array(z) for _ in range(20)]
        for array in given:
            native.loss_and_gradients_on_gpu("nt_xent", [array], [True], 0.5, self.gpu.stream.value)
            array.free()
        self.assertLessEqual(cuda.stand_in("live_allocations"), before)

    def test_threads(self):
        rng, wrong = np.random.default_rng(4), []
        inputs = [unit(rng.standard_normal((2 * i + 4, 9))).astype(np.float32) for i in range(3)]

        def work(z):
            gpu = cuda.Gpu()
            want, _ = nt_xent(0.5, z.astype(np.float64))
            for _ in range(4):
                loss, _ = native.loss_and_gradients_on_gpu("nt_xent", [gpu.array(z)], [True], 0.5, gpu.stream.value)
                if abs(gpu.read(loss) - want) > 1e-5:
                    wrong.append(z.shape)
            gpu.wait()

        cuda.stand_in("interleave", ctypes.c_uint64(3))
        threads = [threading.Thread(target=work, args=[z]) for z in inputs]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        cuda.stand_in("interleave", ctypes.c_uint64(0))
        self.assertEqual(wrong, [])

    def test_the_current_context_is_left_alone(self):
        other = cuda.Gpu(1)
        self.gpu.enter()
        now = ctypes.c_void_p()
        for context in (self.gpu.context, ctypes.c_void_p()):
            given = other.array(np.ones((4, 2), np.float32))
            self.gpu.call("cuCtxSetCurrent", context)
            assigned = native.sinkhorn_on_gpu(given, 0.05, 3, other.stream.value)
            self.gpu.call("cuCtxGetCurrent", ctypes.byref(now))
            self.assertEqual(now.value, context.value)
            np.testing.assert_allclose(other.read(assigned), np.full((4, 2), 0.5), rtol=1e-6)
        other.close()


class Mistakes(cuda.TestCase):
    def test_each_is_named_in_a_sentence_and_gives_the_array_back(self):
        ones = np.ones((4, 2), np.float32)

        class Stranger:
            def __dlpack_device__(self):
                return (2, 0)

            def __dlpack__(self, stream=None):
                return "no capsule"

        array = self.gpu.array
        for given, expected, sentence, taken in (
            (array(ones, strides=[1, 4]), ValueError, "scores is not contiguous", 1),
            (array(ones[:, :1], strides=[2, 1]), ValueError, "scores is not contiguous", 1),
            (array(ones.astype(np.float64)), TypeError, "float32 is needed", 1),
            (array(ones.astype(np.int32)), TypeError, "float32 is needed", 1),
            (array(ones, versioned=True, place=(2, 0), says=(2, 1)), BufferError, "another device", 1),
            (array(ones, says=(1, 0)), ValueError, "device of DLPack's type 1; it must be on a CUDA GPU", 0),
            (array(ones, place=(2, 5)), selfsup.Error, "there is no GPU 5: the driver reports GPUs 0 to 1", 1),
            (array(ones, place=(2, -1)), ValueError, "on GPU -1", 1),
            (array(ones, offset=2), selfsup.Error, "is no multiple of the 4 bytes", 1),
            (ones, ValueError, "type 1; it must be on a CUDA GPU", None),
            ("scores", TypeError, "not an array on a GPU", None),
            (Stranger(), TypeError, "no capsule of DLPack", None),
        ):
            with self.subTest(sentence), self.assertRaisesRegex(expected, sentence) as raised:
                native.sinkhorn_on_gpu(given, 0.05, 3, self.gpu.stream.value)
            self.assertNotIsInstance(raised.exception, selfsup.Bug)
            if taken is not None:
                self.assertEqual(given.given_back, taken, sentence)
        with self.assertRaisesRegex(ValueError, "stream is 0"):
            native.sinkhorn_on_gpu(array(ones), 0.05, 3, 0)
        with self.assertRaisesRegex(ValueError, "wanted says something of each"):
            native.loss_and_gradients_on_gpu("nt_xent", [array(ones)], [], 0.5, self.gpu.stream.value)
        with self.assertRaisesRegex(selfsup.Error, "no loss nt_xnet of 1 arrays"):
            native.loss_and_gradients_on_gpu("nt_xnet", [array(ones)], [True], 0.5, self.gpu.stream.value)
        # The engine's own last check.
        with self.assertRaisesRegex(selfsup.Bug, "nt_xent: 3 rows"):
            native.loss_and_gradients_on_gpu("nt_xent", [array(ones[:3])], [True], 0.5, self.gpu.stream.value)
        self.assertEqual(self.gpu.read(native.sinkhorn_on_gpu(array(ones), 0.05, 3, self.gpu.stream.value)).sum(), 4)

    def test_arrays_on_two_gpus(self):
        other = cuda.Gpu(1)
        ones = np.ones((4, 2), np.float32)
        given = [self.gpu.array(ones), other.array(ones)]
        with self.assertRaisesRegex(ValueError, "on GPU 0 and on GPU 1; all must be on one"):
            native.loss_and_gradients_on_gpu("neg_cosine", given, [True, True], 1.0, self.gpu.stream.value)
        self.assertEqual([array.given_back for array in given], [1, 1])
        other.close()

    def test_what_a_consumer_may_not_ask_for(self):
        array = native.sinkhorn_on_gpu(self.gpu.array(np.ones((4, 2), np.float32)), 0.05, 3, self.gpu.stream.value)
        for words, expected, sentence in (
            ({"stream": -1}, BufferError, "stream is -1"),
            ({"stream": 0}, ValueError, "stream is 0"),
            ({"stream": 2}, BufferError, "the default stream of each thread"),
            ({"stream": -2}, ValueError, "stream is -2"),
            ({"stream": 1, "copy": True}, BufferError, "without a copy"),
            ({"stream": 1, "dl_device": (1, 0)}, BufferError, "on cuda:0, and selfsup moves it nowhere else"),
        ):
            with self.subTest(sentence), self.assertRaisesRegex(expected, sentence):
                array.__dlpack__(**words)
        array.__dlpack__(stream=1, dl_device=(2, 0), copy=False, max_version=(1, 2))
        array.__dlpack__()

    def test_a_captured_stream_is_refused_and_a_call_after_it_works(self):
        given = [self.gpu.array(np.ones((4, 2), np.float32)) for _ in range(2)]
        self.gpu.call("cuStreamBeginCapture_v2", self.gpu.stream, 2)
        with self.assertRaisesRegex(selfsup.Error, "a CUDA graph is being captured"):
            native.sinkhorn_on_gpu(given[0], 0.05, 3, self.gpu.stream.value)
        graph = ctypes.c_void_p()
        self.gpu.call("cuStreamEndCapture", self.gpu.stream, ctypes.byref(graph))
        self.gpu.call("cuGraphDestroy", graph)
        self.assertEqual(self.gpu.read(native.sinkhorn_on_gpu(given[1], 0.05, 3, self.gpu.stream.value)).sum(), 4)

    def test_a_call_that_runs_out_of_memory_is_an_error_and_the_next_one_works(self):
        z = unit(np.random.default_rng(2).standard_normal((64, 128))).astype(np.float32)
        given = [self.gpu.array(z) for _ in range(2)]
        driver = cuda.driver()
        driver.standin_memory.restype = ctypes.c_size_t
        driver.standin_fail.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint32]
        # Every request for a new block fails.
        total = driver.standin_memory(ctypes.c_size_t(0))
        with self.assertRaisesRegex(selfsup.Error, "out of memory"):
            native.loss_and_gradients_on_gpu("nt_xent", given[:1], [True], 0.3, self.gpu.stream.value)
        driver.standin_memory(ctypes.c_size_t(total))
        self.assertEqual(given[0].given_back, 1)
        loss, _ = native.loss_and_gradients_on_gpu("nt_xent", given[1:], [True], 0.3, self.gpu.stream.value)
        self.assertAlmostEqual(float(self.gpu.read(loss)), nt_xent(0.3, z.astype(np.float64))[0], places=5)

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_a_forked_process_gets_a_sentence(self):
        array = native.sinkhorn_on_gpu(self.gpu.array(np.ones((4, 2), np.float32)), 0.05, 3, self.gpu.stream.value)
        taken = cuda.Taken(self.gpu, array)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                array.__dlpack__(stream=1)
                said = "no error"
            except BufferError as error:
                said = str(error)
            # What the parent has is not the child's to give back.
            taken.give_back()
            del array
            os.write(write, said.encode())
            os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            self.assertRegex(pipe.read(), "on a GPU of another process")
        self.assertEqual(taken.numpy().sum(), 4)
        taken.give_back()


if __name__ == "__main__":
    unittest.main()
