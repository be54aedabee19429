// What kernels use of this header is in cuda_on_host.h.
#pragma once
#include "../cuda_on_host.h"
