// The CPU's fast paths: paged attention, Gated DeltaNet, its convolution, norms, GEMMs and experts.
//
// Plain C functions over pointers. The Python modules in this folder check shapes and dtypes and call
// them. All arithmetic is float32; activations, caches and states may be bfloat16 and are rounded
// once, when stored. Head sizes are multiples of LANES. The functions compute what the references of
// the same names in millrace/kernels compute.

#include "native/attention.h"
#include "native/conv.h"
#include "native/gdn.h"
#include "native/gdn_fixed.h"
#include "native/norm.h"
#include "native/gemm.h"
#include "native/experts.h"
#include "native/w4.h"
