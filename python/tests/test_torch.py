"""`selfsup.torch` beside PyTorch's own operations; skipped without torch."""

import copy
import os
import pickle
import shutil
import unittest

import numpy as np

import pictures
import selfsup

try:
    import torch
    import torch.nn.functional as F

    import selfsup.torch as own
except ImportError:
    torch = None


def eager_nt_xent(a, b, temperature, normalize=True):
    z = torch.cat([a, b])
    z = F.normalize(z) if normalize else z
    n = len(a)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(2 * n).roll(n))


def eager_info_nce(q, k, queue, temperature):
    q, k = F.normalize(q), F.normalize(k)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def eager_neg_cosine(p, z):
    return -F.cosine_similarity(p, z).mean()


def eager_swapped(scores, assignments, temperature):
    return -(assignments * F.log_softmax(scores / temperature, 1)).sum(1).mean()


def eager_sinkhorn(scores, epsilon, iterations):
    q = torch.exp((scores - scores.max()) / epsilon).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * len(q)
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


def eager_lars(variant, parameters, gradients, momenta, lr, mu, decay):
    """One step by the formulas of each variant, in place, one parameter at a time."""
    for w, g, m in zip(parameters, gradients, momenta):
        exempt = w.ndim < 2 and variant != "larc"
        trust = 0.02 if variant == "solo-learn" else 1e-3
        d, scale = g + (0.0 if exempt else decay) * w, 1.0
        nw, ng, nd = w.norm(), g.norm(), d.norm()
        if not exempt and variant in ("simclr", "byol"):
            scale = trust * nw / nd if nw > 0 and nd > 0 else 1.0
        elif not exempt and nw > 0 and ng > 0:
            scale = trust * nw / (ng + decay * nw + 1e-8)
            if variant == "solo-learn":
                scale = min(scale / lr, 1.0)
        elif not exempt:
            d = g
        if variant == "simclr":
            m.mul_(mu).add_(lr * scale * d)
            w.sub_(m)
        else:
            m.mul_(mu).add_(scale * d)
            w.sub_(lr * m)


@unittest.skipUnless(torch, "needs torch")
class Losses(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(5)

    def rows(self, n, d, dtype=None, grad=True):
        x = torch.randn(n, d, dtype=torch.float64)
        return x.to(dtype or torch.float64).requires_grad_(grad)

    def cases(self):
        """Name, our loss, the eager one, and inputs; each loss is of the first inputs that want a gradient."""
        queue = F.normalize(torch.randn(130, 17, dtype=torch.float64))
        assigned = eager_sinkhorn(torch.randn(9, 17, dtype=torch.float64), 0.5, 3)
        pair = [self.rows(9, 17), self.rows(9, 17)]
        for t in (0.05, 0.5):
            yield f"nt_xent {t}", lambda a, b, t=t: own.nt_xent(a, b, t), lambda a, b, t=t: eager_nt_xent(a, b, t), pair
            yield (
                f"info_nce {t}",
                lambda q, k, t=t: own.info_nce(q, k, queue.to(q.dtype), t),
                lambda q, k, t=t: eager_info_nce(q, k, queue.to(q.dtype), t),
                pair,
            )
            yield (
                f"swapped_prediction {t}",
                lambda s, t=t: own.swapped_prediction(s, assigned.to(s.dtype), t),
                lambda s, t=t: eager_swapped(s, assigned.to(s.dtype), t),
                pair[:1],
            )
        yield "neg_cosine", own.neg_cosine, eager_neg_cosine, pair
        weights = torch.randn(9, 17, dtype=torch.float64)
        yield (
            "l2_normalize",
            lambda x: (own.l2_normalize(x) * weights.to(x.dtype)).sum(),
            lambda x: (F.normalize(x) * weights.to(x.dtype)).sum(),
            pair[:1],
        )

    def test_values_and_gradients_are_those_of_eager_f64(self):
        for name, ours, eager, inputs in self.cases():
            want = eager(*inputs)
            gradients = torch.autograd.grad(want, inputs)
            for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
                given = [x.detach().to(dtype).requires_grad_() for x in inputs]
                got = ours(*given)
                self.assertEqual((got.dtype, got.shape), (dtype, ()), name)
                self.assertLess(abs(got.double() - want) / max(1.0, abs(want)), tolerance, name)
                (3 * got).backward()
                for x, gradient in zip(given, gradients):
                    scale = max(1.0, gradient.abs().max().item())
                    self.assertLess((x.grad.double() / 3 - gradient).abs().max().item() / scale, tolerance, name)

    def test_gradcheck(self):
        for name, ours, _, inputs in self.cases():
            self.assertTrue(torch.autograd.gradcheck(ours, inputs), name)

    def test_operations_are_well_registered(self):
        a, b = self.rows(4, 3, torch.float32), self.rows(4, 3, torch.float32)
        ops = torch.ops.selfsup
        rows = F.normalize(torch.cat([a, b])).detach().requires_grad_()
        # The check through AOTAutograd differentiates by all outputs, of which the gradients have no derivative.
        kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(ops.loss.default, ("nt_xent", rows, None, None, [True, False], 0.5), test_utils=kinds)
        torch.library.opcheck(ops.loss.default, ("neg_cosine", a, b, None, [True, True], 1.0), test_utils=kinds)
        torch.library.opcheck(ops.sinkhorn.default, (a.detach(), 0.05, 3))

    def test_sinkhorn(self):
        for shape in ((7, 5), (64, 30)):
            scores = F.normalize(torch.randn(*shape, dtype=torch.float64))
            for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
                got = own.sinkhorn(scores.to(dtype), 0.05, 3)
                self.assertLess((got - eager_sinkhorn(scores, 0.05, 3)).abs().max().item(), tolerance)
                self.assertFalse(got.requires_grad)

    def test_sinkhorn_of_scores_beyond_the_range_of_exponentials(self):
        unit, wide = F.normalize(torch.randn(7, 3, dtype=torch.float64)), 50 * torch.randn(6, 4, dtype=torch.float64)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
            for scores, epsilon in ((unit, 0.01), (wide, 0.05)):
                got = own.sinkhorn(scores.to(dtype), epsilon)
                self.assertEqual(got.dtype, dtype)
                self.assertLess((got.double().sum(1) - 1).abs().max().item(), tolerance)
        # Of scores that float64's exponentials hold, what the reference has.
        got = own.sinkhorn(unit.float(), 0.01)
        self.assertLess((got - own.sinkhorn(unit.float().double(), 0.01)).abs().max().item(), 1e-6)
        broken = torch.randn(6, 4)
        broken[0, 0] = torch.nan
        self.assertTrue(own.sinkhorn(broken).isnan().all())

    def test_strides_dtypes_and_gradients_that_are_not_wanted(self):
        wide = torch.randn(17, 18, dtype=torch.float32)
        a, b = wide[:, ::2].T, wide[:, 1::2].T
        self.assertFalse(a.is_contiguous())
        self.assertAlmostEqual(own.nt_xent(a, b).item(), own.nt_xent(a.contiguous(), b.contiguous()).item(), places=6)
        half = own.nt_xent(a.bfloat16().requires_grad_(), b.bfloat16())
        self.assertEqual(half.dtype, torch.bfloat16)
        half.backward()
        with torch.no_grad():
            self.assertFalse(own.nt_xent(a.clone().requires_grad_(), b).requires_grad)
        p, z = self.rows(4, 3), self.rows(4, 3)
        own.neg_cosine(p, z.detach()).backward()
        self.assertIsNone(z.grad)
        for loss in (own.neg_cosine(p, z), own.nt_xent(p, z)):
            (first,) = torch.autograd.grad(loss, p, create_graph=True)
            with self.assertRaises(NotImplementedError):
                torch.autograd.grad(first.sum(), p)

    def test_halves_are_computed_in_float32(self):
        for dtype in (torch.float16, torch.bfloat16):
            a = self.rows(9, 17, torch.float32, grad=False)
            b = a + 0.3 * self.rows(9, 17, torch.float32, grad=False)
            queue, assigned = F.normalize(torch.randn(30, 17)), torch.softmax(torch.randn(9, 17), 1)
            a, b = a.to(dtype), b.to(dtype)
            zero, large = a.clone(), 9000 * a.to(torch.float16)
            zero[3] = 0
            for name, loss, pair in (
                ("nt_xent", lambda a, b: own.nt_xent(a, b, 0.05), (a, b)),
                ("nt_xent, a row of zeros", own.nt_xent, (zero, b)),
                ("nt_xent, norms above the range", own.nt_xent, (large, 9000 * b.to(torch.float16))),
                ("nt_xent, rows as they are", lambda a, b: own.nt_xent(a, b, 5.0, normalize=False), (a, b)),
                # What has no gradient stays in float32.
                ("info_nce", lambda q, k: own.info_nce(q, k, queue), (a, b)),
                ("neg_cosine", own.neg_cosine, (a, b)),
                ("swapped_prediction", lambda s, _: own.swapped_prediction(s, assigned), (a, b)),
            ):
                with self.subTest(name, dtype=dtype):
                    given = [x.clone().requires_grad_() for x in pair]
                    wide = [x.float().requires_grad_() for x in pair]
                    got, want = loss(*given), loss(*wide)
                    self.assertTrue(torch.equal(got, want.to(given[0].dtype)))
                    (1024 * got).backward()
                    (1024 * want).backward()
                    for x, y in zip(given, wide):
                        if y.grad is not None:
                            self.assertTrue(torch.equal(x.grad, y.grad.to(x.dtype)))

    def test_losses_of_sure_pairs(self):
        a = torch.randn(33, 128)
        b = a + 0.1 * torch.randn(33, 128)
        queue = F.normalize(torch.randn(9, 128))
        for t in (0.07, 0.01, 1e-3):
            for got, want in (
                (own.nt_xent(a, b, t), eager_nt_xent(a.double(), b.double(), t)),
                (own.info_nce(a, b, queue, t), eager_info_nce(a.double(), b.double(), queue.double(), t)),
            ):
                self.assertGreaterEqual(got.item(), 0)
                self.assertLess(abs(got - want).item(), 2e-7 / t)

    def test_forward_mode_is_refused(self):
        a, b = torch.randn(5, 4), torch.randn(5, 4)
        for loss in (
            lambda x: own.nt_xent(x, b),
            lambda x: own.info_nce(b, x, a),
            lambda x: own.neg_cosine(x, b),
            lambda x: own.swapped_prediction(x, b.softmax(1)),
        ):
            with self.assertRaisesRegex(NotImplementedError, "no forward-mode derivative"):
                torch.func.jvp(loss, (a,), (b,))
            with torch.autograd.forward_ad.dual_level():
                with self.assertRaisesRegex(NotImplementedError, "no forward-mode derivative"):
                    loss(torch.autograd.forward_ad.make_dual(a, b))
                self.assertTrue(loss(a).isfinite())

    def test_compiled(self):
        a, b = self.rows(8, 5, torch.float32), self.rows(8, 5, torch.float32)

        def loss(a, b):
            return own.nt_xent(a * 2, b, 0.5) + own.neg_cosine(a, b.detach())

        want = torch.autograd.grad(loss(a, b), (a, b))
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        got = torch.autograd.grad(compiled(a, b), (a, b))
        self.assertTrue(all(torch.allclose(x, y) for x, y in zip(got, want)))

    @unittest.skipUnless(shutil.which(os.environ.get("CXX", "g++")), "the default backend of torch.compile needs a C++ compiler")
    def test_training_steps_are_compiled_by_the_default_backend(self):
        views = [torch.randn(32, 12), torch.randn(32, 12)]
        queue = F.normalize(torch.randn(64, 8))

        def curve(loss, compiled):
            torch.manual_seed(2)
            model = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            step = lambda a, b: loss(model(a), model(b))
            # One graph: the loss does not break it.
            step = torch.compile(step, fullgraph=True) if compiled else step
            losses = []
            for _ in range(5):
                optimizer.zero_grad()
                value = step(*views)
                value.backward()
                optimizer.step()
                losses.append(value.item())
            return losses

        for name, loss in (
            ("nt_xent", lambda a, b: own.nt_xent(a, b, 0.5)),
            ("info_nce", lambda q, k: own.info_nce(q, k.detach(), queue, 0.07)),
        ):
            want, got = curve(loss, False), curve(loss, True)
            self.assertGreater(want[0] - want[-1], 0.1, name)
            for a, b in zip(want, got):
                self.assertAlmostEqual(a, b, delta=1e-5 * max(1.0, abs(a)), msg=name)

    def test_mistakes(self):
        a, row, linear, counts = torch.randn(4, 3), torch.nn.Parameter(torch.randn(3)), torch.nn.Linear, torch.nn.Module()
        counts.count = torch.nn.Parameter(torch.arange(3), requires_grad=False)
        for call, expected, sentence in (
            (lambda: own.nt_xent(a, a[:3]), ValueError, r"\[4, 3\] and \[3, 3\] differ"),
            (lambda: own.nt_xent(a[:1], a[:1]), ValueError, "one pair has no negatives"),
            (lambda: own.nt_xent(a, a, 0.0), ValueError, "temperature is 0.0"),
            (lambda: own.nt_xent(a, a, float("inf")), ValueError, "temperature is inf; it must be within 1e-6 to 1e6"),
            (lambda: own.info_nce(a, a, a, float("nan")), ValueError, "temperature is nan"),
            (lambda: own.swapped_prediction(a, a, 1e-46), ValueError, "temperature is 1e-46"),
            (lambda: own.nt_xent(a, a, torch.nn.Parameter(torch.tensor(0.5))), TypeError, "a tensor, which would get no gradient"),
            (lambda: own.nt_xent(a[0], a[0]), ValueError, r"a is \[3\]"),
            (lambda: own.nt_xent(a.long(), a.long()), TypeError, "must hold floats"),
            (lambda: own.nt_xent(a.numpy(), a), TypeError, "a is a ndarray"),
            (lambda: own.nt_xent(a.to("meta"), a.to("meta")), ValueError, "on the CPU and on NVIDIA GPUs"),
            (lambda: own.info_nce(a, a, a.T), ValueError, "rows differ in length"),
            (lambda: own.swapped_prediction(a, a[:, :2]), ValueError, "differ"),
            (lambda: own.sinkhorn(a, 0.0), ValueError, "epsilon is 0.0"),
            (lambda: own.sinkhorn(a, iterations=0), ValueError, "iterations 0"),
            (lambda: own.l2_normalize(a[:0]), ValueError, "neither of them 0"),
            (lambda: own.LARS([row], lr=-1.0), ValueError, "lr is -1.0, which is out of range"),
            (lambda: own.LARS([row], lr=1.0, trust=-1.0), ValueError, "trust is -1.0, which is out of range"),
            (lambda: own.LARS([{"params": [row], "lr": -1.0}], lr=1.0), ValueError, "lr is -1.0, which is out of range"),
            (lambda: own.LARS([{"params": [row], "momentum": 1.0}], lr=1.0), ValueError, "momentum is 1.0, which is out of range"),
            (lambda: own.LARS([{"params": [row], "variant": "byol"}], lr=1.0), ValueError, "a group is of variant 'byol'"),
            (lambda: own.LARS([row], lr=1.0, variant="lars"), ValueError, "variant is 'lars'"),
            (
                lambda: own.LARS([row], lr=1.0).load_state_dict(own.LARS([row], lr=1.0, variant="byol").state_dict()),
                ValueError,
                "the state is of a LARS of variant 'byol', and this one is of 'simclr'",
            ),
            (lambda: own.update_momentum(linear(2, 3), linear(3, 2), 0.9), ValueError, r"weight is \[3, 2\] of .*float32 and \[2, 3\] of"),
            (lambda: own.update_momentum(linear(2, 2), linear(2, 2, bias=False), 0.9), ValueError, "only one has bias"),
            (lambda: own.update_momentum(linear(2, 2), linear(2, 2).half(), 0.9), ValueError, "weight is .*float32 and .*float16"),
            (lambda: own.update_momentum(counts, counts, 0.9), ValueError, "count is of torch.int64, which has no mean"),
            (lambda: own.update_momentum(linear(2, 2), linear(2, 2), 2.0), ValueError, "tau is 2.0"),
        ):
            with self.subTest(sentence), self.assertRaisesRegex(expected, sentence):
                call()

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_losses_work_in_a_forked_process(self):
        a = torch.randn(64, 8)
        want = own.nt_xent(a, a.flip(0)).item()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, str(own.nt_xent(a, a.flip(0), normalize=True).item()).encode())
            os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            self.assertEqual(float(pipe.read()), want)


@unittest.skipUnless(torch, "needs torch")
class Updates(unittest.TestCase):
    def test_lars_is_as_published(self):
        for variant in ("simclr", "byol", "larc", "lightly", "solo-learn"):
            torch.manual_seed(1)
            params = [torch.randn(5, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)]
            want, momenta = copy.deepcopy(params), [torch.zeros_like(p) for p in params]
            given = [p.clone().requires_grad_() for p in params]
            optimizer = own.LARS(given, lr=0.3, momentum=0.9, weight_decay=1e-2, variant=variant)
            for step in range(5):
                gradients = [torch.randn_like(p) for p in params]
                if step == 2:
                    gradients[0].zero_()
                for group in optimizer.param_groups:
                    group["lr"] = 0.3 + 0.1 * step
                for p, g in zip(given, gradients):
                    p.grad = g.clone()
                optimizer.step()
                eager_lars(variant, want, gradients, momenta, 0.3 + 0.1 * step, 0.9, 1e-2)
            for p, w in zip(given, want):
                self.assertLess((p.detach() - w).abs().max().item(), 1e-12, variant)
            again = own.LARS([p.detach().clone().requires_grad_() for p in given], lr=0.1, variant=variant)
            again.load_state_dict(optimizer.state_dict())
            self.assertTrue(torch.equal(again.state[again.param_groups[0]["params"][0]]["momentum"], optimizer.state[given[0]]["momentum"]))

    def test_lars_of_lightly_scales_nothing_without_decay(self):
        for decay, exempt in ((0.0, True), (1e-2, False)):
            weight, gradient = torch.randn(5, 4), torch.randn(5, 4)
            given = weight.clone().requires_grad_()
            given.grad = gradient
            own.LARS([{"params": [given], "weight_decay": decay}], lr=0.3, variant="lightly").step()
            self.assertEqual(torch.allclose(given, weight - 0.3 * gradient), exempt)

    def test_lars_is_copied_and_pickled(self):
        given = torch.nn.Parameter(torch.randn(5, 4))
        optimizer = own.LARS([given], lr=0.3, weight_decay=1e-2, variant="lightly")
        given.grad = torch.randn(5, 4)
        optimizer.step()
        copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
        optimizer.step()
        for other in copies:
            (p,) = other.param_groups[0]["params"]
            p.grad = given.grad.clone()
            other.step()
            self.assertTrue(torch.equal(p, given))
        # A state without a variant, as an older version wrote it, is of the optimizer that takes it.
        state = optimizer.state_dict()
        del state["param_groups"][0]["variant"]
        optimizer.load_state_dict(state)
        self.assertEqual(optimizer.state_dict()["param_groups"][0]["variant"], "lightly")

    def test_a_momentum_encoder_is_paired_by_names(self):
        online, target = (torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in order}) for order in ("ab", "ba"))
        own.update_momentum(online, target, 0.0)
        self.assertTrue(all(torch.equal(online[name].weight, target[name].weight) for name in "ab"))

    def test_a_momentum_encoder_follows(self):
        online, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        want = [0.9 * t.detach() + 0.1 * o.detach() for t, o in zip(target.parameters(), online.parameters())]
        own.update_momentum(online, target, 0.9)
        self.assertTrue(all(torch.allclose(a, b) for a, b in zip(target.parameters(), want)))


@unittest.skipUnless(torch, "needs torch")
class Tensors(unittest.TestCase):
    def test_a_loader_hands_out_tensors_that_share_memory(self):
        loader = selfsup.Loader(pictures.pixels(8), {"size": 16, "repeat": 2}, 4, labels=[0, 1] * 4, framework="torch")
        for views, labels in loader:
            self.assertEqual((views[0].shape, labels.dtype), ((4, 3, 16, 16), torch.int64))
            F.conv2d(views[0], torch.ones(2, 3, 3, 3))
            self.assertTrue(np.shares_memory(views[0].numpy(), views[0].permute(0, 2, 3, 1).numpy()))

    def test_views_are_a_transform_in_workers(self):
        class Set(torch.utils.data.Dataset):
            views = selfsup.Views({"size": 16, "repeat": 2}, framework="torch")

            def __len__(self):
                return 8

            def __getitem__(self, i):
                return self.views(pictures.pixels(8)[i]), i

        def epoch():
            torch.manual_seed(3)
            return [views[0] for views, _ in torch.utils.data.DataLoader(Set(), batch_size=4, num_workers=2)]

        first, second = epoch(), epoch()
        self.assertEqual(first[0].shape, (4, 3, 16, 16))
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(first, second)))
        self.assertFalse(torch.equal(first[0], first[1]))


if __name__ == "__main__":
    unittest.main()
