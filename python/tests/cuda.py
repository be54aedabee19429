"""A GPU for the tests without torch: arrays in the memory of a CUDA driver, exchanged by DLPack, through ctypes alone.

The driver is the one that the engine opens: on a machine without a GPU the stand-in, whose file ``SELFSUP_STAND_IN`` names. An array of
these tests is like one of another library's: it lies in a stream of its own, to which values come late, and its memory is overwritten
in that stream's order once it is given back.
"""

import ctypes
import math
import os
import sys
import unittest

import numpy as np

FLOAT, INT, NAN_BYTE = 2, 0, 0xFF


class Device(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("ordinal", ctypes.c_int32)]


class Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Array(ctypes.Structure):
    """``DLTensor``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("dtype", Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    ]


DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    """``DLManagedTensor``."""

    _fields_ = [("array", Array), ("context", ctypes.c_void_p), ("deleter", DELETER)]


class Versioned(ctypes.Structure):
    """``DLManagedTensorVersioned``."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", DELETER),
        ("flags", ctypes.c_uint64),
        ("array", Array),
    ]


NAMES = {False: b"dltensor", True: b"dltensor_versioned"}
STRUCTURES = {False: Managed, True: Versioned}

_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype, _name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.restype, _rename.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_char_p]


class Gpu:
    """A GPU's primary context, and a stream in it: one that waits for no other, or the legacy default stream, as PyTorch's is."""

    def __init__(self, ordinal=0, legacy=False):
        self.driver = driver()
        self.ordinal, self.legacy = ordinal, legacy
        self.context, self.stream = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), ordinal)
        self.enter()
        if legacy:
            self.stream.value = 1
        else:
            self.call("cuStreamCreate", ctypes.byref(self.stream), 1)
        # Copies from pinned memory land in the stream's order, not at once.
        self.pinned = []

    def call(self, name, *arguments):
        result = getattr(self.driver, name)(*arguments)
        if result:
            raise OSError(f"{name}: CUDA error {result}; {report()}")

    def enter(self):
        self.call("cuCtxSetCurrent", self.context)

    def wait(self):
        self.enter()
        self.call("cuStreamSynchronize", self.stream)

    def close(self):
        self.wait()
        for at in self.pinned:
            self.call("cuMemFreeHost", at)
        if not self.legacy:
            self.call("cuStreamDestroy_v2", self.stream)
        self.call("cuDevicePrimaryCtxRelease_v2", self.ordinal)

    def allocate(self, count):
        at = ctypes.c_uint64()
        self.enter()
        self.call("cuMemAlloc_v2", ctypes.byref(at), ctypes.c_size_t(count))
        return at.value

    def free(self, at):
        self.wait()
        self.call("cuMemFree_v2", ctypes.c_uint64(at))

    def queue_upload(self, to, values):
        """Queues a copy of an array, which lands when the driver pleases."""
        self.enter()
        at = ctypes.c_void_p()
        self.call("cuMemAllocHost_v2", ctypes.byref(at), ctypes.c_size_t(values.nbytes))
        self.pinned.append(at)
        ctypes.memmove(at, values.ctypes.data, values.nbytes)
        self.call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(to), at, ctypes.c_size_t(values.nbytes), self.stream)

    def download(self, at, count, dtype=np.float32):
        """``count`` values behind all that is queued on the stream."""
        values = np.empty(count, dtype)
        self.wait()
        self.call("cuMemcpyDtoH_v2", ctypes.c_void_p(values.ctypes.data), ctypes.c_uint64(at), ctypes.c_size_t(values.nbytes))
        return values

    def array(self, values, **how):
        return Given(self, np.asarray(values), **how)

    def read(self, array, versioned=True):
        """The values of an array of the engine's, which is given back."""
        with Taken(self, array, versioned) as taken:
            return taken.numpy()


class Given:
    """An array that a library hands to the engine."""

    def __init__(self, gpu, values, offset=0, strides=None, versioned=False, place=None, says=None, null_strides=False):
        self.gpu, self.shape, self.dtype = gpu, values.shape, values.dtype
        self.strides, self.versioned, self.null_strides = strides, versioned, null_strides
        self.place = place or (2, gpu.ordinal)
        self.says = says or self.place
        self.given_back, self.asked_with, self.kept = 0, None, {}
        flat = np.ascontiguousarray(values).ravel()
        self.offset, self.bytes = offset, flat.nbytes + offset
        self.at = gpu.allocate(self.bytes)
        gpu.queue_upload(self.at + offset, flat)

    def __dlpack_device__(self):
        return self.says

    def __dlpack__(self, stream=None):
        self.asked_with = stream
        structure = STRUCTURES[self.versioned]()
        code = {"f": FLOAT, "i": INT}[self.dtype.kind]
        n = len(self.shape)
        shape = (ctypes.c_int64 * n)(*self.shape)
        row_major = [math.prod(self.shape[i + 1 :]) for i in range(n)]
        strides = (ctypes.c_int64 * n)(*(self.strides or row_major))
        structure.array = Array(
            self.at,
            Device(*self.place),
            n,
            Type(code, 8 * self.dtype.itemsize, 1),
            shape,
            None if self.null_strides else strides,
            self.offset,
        )
        if self.versioned:
            structure.major, structure.minor = 1, 1
        structure.deleter = DELETER(self._give_back)
        self.kept[id(structure)] = (structure, shape, strides)
        return _new(ctypes.addressof(structure), NAMES[self.versioned], None)

    def _give_back(self, _):
        """As an allocator does that serves the next request in the stream's order: by then the memory has other values."""
        self.given_back += 1
        self.gpu.enter()
        self.gpu.call(
            "cuMemsetD8Async", ctypes.c_uint64(self.at), ctypes.c_ubyte(NAN_BYTE), ctypes.c_size_t(self.bytes), self.gpu.stream
        )

    def is_overwritten(self):
        return np.isnan(self.gpu.download(self.at + self.offset, math.prod(self.shape))).all()

    def free(self):
        self.gpu.free(self.at)


class Taken:
    """An array of the engine's in a library's hands."""

    def __init__(self, gpu, array, versioned=True):
        self.gpu = gpu
        words = {"max_version": (1, 0)} if versioned else {}
        capsule = array.__dlpack__(stream=gpu.stream.value, **words)
        name = NAMES[versioned]
        assert _name(capsule) == name, _name(capsule)
        self.structure = STRUCTURES[versioned].from_address(_pointer(capsule, name))
        self.used = b"used_" + name
        assert _rename(capsule, self.used) == 0
        of = self.structure.array
        assert (of.device.kind, of.device.ordinal) == array.__dlpack_device__() == (2, gpu.ordinal)
        assert (of.dtype.code, of.dtype.bits, of.dtype.lanes) == (FLOAT, 32, 1)
        self.shape = [of.shape[i] for i in range(of.ndim)]
        self.strides = [of.strides[i] for i in range(of.ndim)]
        self.at = of.data + of.offset

    def copy(self):
        """Queues a copy of the elements in the stream; returns where it will be, and how many there are."""
        count = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides))
        to = self.gpu.allocate(4 * count)
        self.gpu.call(
            "cuMemcpyDtoDAsync_v2", ctypes.c_uint64(to), ctypes.c_uint64(self.at), ctypes.c_size_t(4 * count), self.gpu.stream
        )
        return to, count

    def strided(self, flat):
        return np.lib.stride_tricks.as_strided(flat, self.shape, [4 * stride for stride in self.strides]).copy()

    def numpy(self):
        to, count = self.copy()
        flat = self.gpu.download(to, count)
        self.gpu.free(to)
        return self.strided(flat)

    def give_back(self):
        if self.structure is not None:
            self.structure.deleter(ctypes.addressof(self.structure))
            self.structure = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.give_back()


_driver = None


def driver():
    """The driver that the engine uses in this process."""
    global _driver
    if _driver is None:
        os.environ.setdefault("SELFSUP_STAND_IN_DEVICES", "2")
        # The engine asks the system for this name and gets the file that is open.
        _driver = ctypes.CDLL(os.environ.get("SELFSUP_STAND_IN") or "libcuda.so.1")
    return _driver


def stand_in(name, *arguments):
    """Calls a control function of the stand-in (emulator/src/control.rs)."""
    return getattr(driver(), f"standin_{name}")(*arguments)


def report():
    if not os.environ.get("SELFSUP_STAND_IN"):
        return "no report"
    driver().standin_last_report.restype = ctypes.c_char_p
    return driver().standin_last_report().decode()


def why_not():
    """Why tests of the GPU cannot run; ``None`` if they can. Where they must, that is an error."""
    required = bool(os.environ.get("SELFSUP_REQUIRE_KERNELS"))
    if not os.environ.get("SELFSUP_STAND_IN"):
        reason = "NOT TESTED: SELFSUP_STAND_IN names no stand-in driver (scripts/test-python sets it)"
    else:
        import selfsup

        driver()
        try:
            gpu = Gpu(legacy=True)
            selfsup._native.sinkhorn_on_gpu(gpu.array(np.ones((2, 2), np.float32)), 0.05, 3, 1)
            gpu.close()
            return None
        except selfsup.Error as error:
            reason = f"NOT TESTED: {error}"
    if required:
        raise AssertionError(f"{reason}; SELFSUP_REQUIRE_KERNELS is set: that is a failure")
    return reason


class TestCase(unittest.TestCase):
    """A test on the stand-in, each kernel's accesses checked."""

    @classmethod
    def setUpClass(cls):
        reason = why_not()
        if reason:
            print(f"{cls.__name__}: {reason}", file=sys.stderr)
            raise unittest.SkipTest(reason)

    def setUp(self):
        stand_in("check", 1)
        stand_in("seed", ctypes.c_uint64(7))
        self.gpu = Gpu()
        self.addCleanup(self.gpu.close)

    def count(self, what):
        driver().standin_count.restype = ctypes.c_uint64
        return stand_in("count", what.encode())
