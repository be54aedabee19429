"""PyTorch on a GPU: losses on CUDA tensors and views in CUDA memory. Needs a GPU that PyTorch sees and a package built with nvcc; without
them it says so. The exchange itself is tested without a GPU, on a stand-in driver that PyTorch cannot use: gpu_losses.py."""

import subprocess
import sys
import unittest

import numpy as np

import pictures
import selfsup

try:
    import torch
    import torch.nn.functional as F

    import selfsup.torch as own
    from test_torch import eager_info_nce, eager_neg_cosine, eager_nt_xent, eager_sinkhorn, eager_swapped
except ImportError:
    torch = None


def why_not():
    if torch is None:
        return "NOT TESTED on a GPU: there is no torch"
    if not torch.cuda.is_available():
        return f"NOT TESTED on a GPU: torch {torch.__version__} sees none"
    try:
        selfsup._native.sinkhorn_on_gpu(torch.ones(2, 2, device="cuda"), 0.05, 3, 1)
    except selfsup.Error as error:
        return f"NOT TESTED on a GPU: {error}"
    return None


@unittest.skipIf(torch is None, "needs torch")
class Registration(unittest.TestCase):
    """What holds without a GPU: the operations have kernels for one, and their fakes work on its tensors."""

    def test_operations_have_kernels_for_both_devices(self):
        for name in ("selfsup::loss", "selfsup::sinkhorn"):
            for key in ("CPU", "CUDA"):
                self.assertTrue(torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key))

    def test_fake_tensors_on_a_gpu(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        # Without gradients: a tensor that wants one asks the GPU for its stream, even a fake one.
        with FakeTensorMode():
            a, b = (torch.empty(4, 3, device="cuda") for _ in range(2))
            for loss in (own.nt_xent(a, b), own.neg_cosine(a, b), own.info_nce(a, b, torch.empty(5, 3, device="cuda"))):
                self.assertEqual((loss.shape, loss.device.type), ((), "cuda"))
            self.assertEqual(own.sinkhorn(a).device.type, "cuda")
            for call, sentence in (
                (lambda: own.nt_xent(a, b.cpu()), "tensors are on cpu and cuda:0; all must be on one device"),
                (lambda: own.nt_xent(a.double(), b.double()), r"float64 on cuda:0, and the engine computes float64 on the CPU only"),
            ):
                with self.assertRaisesRegex(ValueError, sentence):
                    call()


    def test_what_is_passed_to_the_engine_and_what_comes_back(self):
        """With the CPU's computation in the place of the GPU's, and NumPy's arrays, which are DLPack too, in that of the engine's."""
        from contextlib import nullcontext
        from unittest import mock

        def losses(name, inputs, wanted, temperature, stream):
            self.assertEqual(stream, 1)
            value, gradients = selfsup._native.loss_and_gradients(name, [x.numpy() for x in inputs], wanted, temperature, 1)
            return np.array(value, np.float32), gradients

        def sinkhorn(scores, epsilon, iterations, stream):
            return selfsup._native.sinkhorn(scores.numpy(), epsilon, iterations, 1)

        a, b, queue = F.normalize(torch.randn(6, 5)), F.normalize(torch.randn(6, 5).T.contiguous().T), F.normalize(torch.randn(9, 5))
        calls = (
            ("nt_xent", a, None, None, [True, False], 0.5),
            ("nt_xent", a, None, None, [False, False], 0.5),
            ("info_nce", a, b, queue, [True, True], 0.2),
            ("info_nce", a, b, queue, [False, True], 0.2),
            ("neg_cosine", a, b, None, [True, False], 1.0),
            ("soft_cross_entropy", a, None, own.sinkhorn(b), [True, False], 0.1),
        )
        with (
            mock.patch.object(own.torch.cuda, "device", lambda _: nullcontext()),
            mock.patch.object(own, "_stream", lambda: 1),
            mock.patch.object(own._native, "loss_and_gradients_on_gpu", losses),
            mock.patch.object(own._native, "sinkhorn_on_gpu", sinkhorn),
        ):
            for call in calls:
                for got, want in zip(own._loss_on_gpu(*call), own._loss_now(*call)):
                    torch.testing.assert_close(got, want)
            torch.testing.assert_close(own._sinkhorn_on_gpu(b, 0.05, 3), own._sinkhorn_now(b, 0.05, 3))


class OnAGpu(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        reason = why_not()
        if reason:
            print(reason, file=sys.stderr)
            raise unittest.SkipTest(reason)

    def setUp(self):
        torch.manual_seed(5)

    def rows(self, n, d):
        return torch.randn(n, d, dtype=torch.float64)

    def cases(self):
        a, b = self.rows(37, 65), self.rows(37, 65)
        queue = F.normalize(self.rows(130, 65))
        assigned = eager_sinkhorn(self.rows(37, 65), 0.5, 3)
        for t in (0.05, 0.5):
            yield "nt_xent", (a, b), lambda own_, a, b, t=t: own_.nt_xent(a, b, t), lambda a, b, t=t: eager_nt_xent(a, b, t)
            yield (
                "info_nce",
                (a, b),
                lambda own_, a, b, t=t: own_.info_nce(a, b, queue.to(a), t),
                lambda a, b, t=t: eager_info_nce(a, b, queue, t),
            )
            yield (
                "swapped_prediction",
                (a,),
                lambda own_, a, t=t: own_.swapped_prediction(a, assigned.to(a), t),
                lambda a, t=t: eager_swapped(a, assigned, t),
            )
        yield "neg_cosine", (a, b), lambda own_, a, b: own_.neg_cosine(a, b), eager_neg_cosine

    def test_values_and_gradients_are_those_of_eager_f64(self):
        for name, inputs, ours, eager in self.cases():
            given = [x.clone().requires_grad_() for x in inputs]
            want = eager(*given)
            gradients = torch.autograd.grad(want, given)
            for dtype, tolerance in ((torch.float32, 3e-5), (torch.bfloat16, 3e-2)):
                on_gpu = [x.to("cuda", dtype).requires_grad_() for x in inputs]
                loss = ours(own, *on_gpu)
                self.assertEqual((loss.device.type, loss.dtype, loss.shape), ("cuda", dtype, ()), name)
                loss.backward()
                self.assertLess(abs(loss.item() - want.item()) / max(1.0, abs(want.item())), tolerance, name)
                for x, gradient in zip(on_gpu, gradients):
                    error = (x.grad.double().cpu() - gradient).norm() / gradient.norm()
                    self.assertLess(error.item(), tolerance, name)

    def test_sinkhorn_and_strides(self):
        scores = F.normalize(self.rows(64, 30))
        got = own.sinkhorn(scores.float().cuda().T.contiguous().T, 0.05, 3)
        self.assertLess((got.double().cpu() - eager_sinkhorn(scores, 0.05, 3)).abs().max().item(), 2e-6)

    def test_streams_and_reused_memory(self):
        """Memory of both allocators goes back and forth between calls that nobody waits for, on two streams."""
        side, losses, want = torch.cuda.Stream(), [], []
        for i in range(200):
            stream = side if i % 2 else torch.cuda.default_stream()
            with torch.cuda.stream(stream):
                a = torch.randn(256, 128, device="cuda", generator=torch.Generator("cuda").manual_seed(i)).requires_grad_()
                b = a.detach().roll(1, 0)
                loss = own.nt_xent(a, b, 0.5)
                loss.backward()
                losses.append((loss.detach() + a.grad.square().sum()).clone())
                e = a.detach().requires_grad_()
                eager = F.cross_entropy(
                    (F.normalize(torch.cat([e, b])) @ F.normalize(torch.cat([e, b])).T / 0.5).fill_diagonal_(-torch.inf),
                    torch.arange(512, device="cuda").roll(256),
                )
                eager.backward()
                want.append((eager.detach() + e.grad.square().sum()).clone())
                del a, b, e, loss, eager
        torch.cuda.synchronize()
        for i, (got, eager) in enumerate(zip(losses, want)):
            self.assertAlmostEqual(got.item(), eager.item(), delta=1e-4 * abs(eager.item()), msg=i)

    def test_the_host_does_not_wait(self):
        a, b = (torch.randn(64, 32, device="cuda", requires_grad=True) for _ in range(2))
        own.nt_xent(a, b).backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.cuda._sleep(500_000_000)
            own.nt_xent(a, b).backward()
            self.assertFalse(torch.cuda.current_stream().query(), "the loss waited for the GPU")
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_captured_and_compiled(self):
        a, b = (torch.randn(64, 32, device="cuda", requires_grad=True) for _ in range(2))
        want = torch.autograd.grad(own.nt_xent(a * 2, b), a)[0]
        with self.assertRaisesRegex(selfsup.Error, "a CUDA graph is being captured"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                own.sinkhorn(a.detach())
        torch.cuda.synchronize()
        for mode in (None, "reduce-overhead"):
            compiled = torch.compile(lambda a, b: own.nt_xent(a * 2, b), fullgraph=True, mode=mode)
            for _ in range(4):
                got = torch.autograd.grad(compiled(a, b), a)[0]
                torch.testing.assert_close(got, want)

    def test_the_current_gpu_stays(self):
        last = torch.cuda.device_count() - 1
        a = torch.randn(8, 4, device=f"cuda:{last}", requires_grad=True)
        own.nt_xent(a, a.detach().roll(1, 0)).backward()
        self.assertEqual((torch.cuda.current_device(), a.grad.device.index), (0, last))

    def test_a_loader_hands_out_views_on_the_gpu(self):
        policy = {"size": 16, "repeat": 2, "flip": 0.5, "jitter": {"p": 0.8, "brightness": 0.4}}
        words = {"labels": [0, 1] * 8, "framework": "torch", "threads": 2}
        on_gpu = selfsup.Loader(pictures.pixels(16), policy, 4, device="cuda:0", **words)
        on_cpu = selfsup.Loader(pictures.pixels(16), policy, 4, **words)
        for _ in range(2):
            for (views, labels), (others, other_labels) in zip(on_gpu, on_cpu):
                self.assertEqual((views[0].device.type, labels.device.type), ("cuda", "cuda"))
                self.assertTrue(all(torch.equal(a.cpu(), b) for a, b in zip(views, others)))
                self.assertTrue(torch.equal(labels.cpu(), other_labels))
                F.conv2d(views[0], torch.ones(2, 3, 3, 3, device="cuda"))

    def test_the_program_ends(self):
        """With the engine's memory in PyTorch's hands, and both contexts going away."""
        lines = (
            "import torch, selfsup.torch as own; a = torch.ones(4, 3, device='cuda', requires_grad=True); "
            "own.nt_xent(a, a).backward(); print(a.grad.sum().isfinite().item())"
        )
        ended = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
        self.assertEqual((ended.returncode, ended.stdout.strip()), (0, "True"), ended.stderr)


if __name__ == "__main__":
    unittest.main()
