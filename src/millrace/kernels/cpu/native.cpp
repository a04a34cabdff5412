// The CPU's fast paths: paged attention, Gated DeltaNet, its convolution, and the norms around them.
//
// Plain C functions over pointers; the Python modules beside this file check shapes and types and
// call them. All sums are float32; activations, caches and states may be bfloat16 and are rounded
// once, when stored. Lengths of heads are multiples of LANES. What the functions compute is
// defined by the references in millrace/kernels; the names here are theirs.

#include "native/attention.h"
#include "native/conv.h"
#include "native/gdn.h"
#include "native/norm.h"
#include "native/product.h"
