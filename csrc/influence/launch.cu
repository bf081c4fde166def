// Host side of the influence kernels: what they take, how much room they need, their launches. Declared in args.h.
#include "influence/args.h"
#include "influence/kernel.cuh"
#include "influence/wgrad_dot_sm90.cuh"

namespace mr1 {
namespace {

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
  return value;
}

// --- wgrad_dot on sm_90a -----------------------------------------------------------------------------------------------------------

#if defined(MR1_EMULATE)
bool tensor_maps_available() { return true; }

const char* encode(sm90::TensorMap* map, const void* data, DType, int64_t columns, int64_t rows, int64_t row_stride) {
  *map = {static_cast<const uint16_t*>(data), columns, rows, row_stride, 64, kStepTokens};
  return nullptr;
}
#else
// The driver's function, looked up through the runtime: libcuda is not linked, so the library loads where there is no driver.
using Encode = decltype(&cuTensorMapEncodeTiled);
Encode tensor_map_encoder() {
  static const Encode found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) cudaGetLastError();  // asked and answered: not for whoever asks next
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  return found;
}
bool tensor_maps_available() { return tensor_map_encoder() != nullptr; }

// Boxes of 64 columns (128 bytes, the swizzle's width) x kStepTokens tokens; outside the matrix zeros.
const char* encode(sm90::TensorMap* map, const void* data, DType dtype, int64_t columns, int64_t rows, int64_t row_stride) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride) * 2};
  const cuuint32_t box[2] = {64, kStepTokens}, step[2] = {1, 1};
  const CUresult result = tensor_map_encoder()(
      map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(data), sizes, strides, box,
      step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the matrix";
}
#endif

WgradPlan plan_of(const WgradDotArgs& args) {
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  return wgrad_plan(args.tokens, args.dout, args.din, args.probes, args.documents, multiprocessors > 0 ? multiprocessors : 1);
}

int64_t partial_bytes(const WgradPlan& plan) { return ceil_div(partial_floats(plan) * 4, 256) * 256; }

template <class T, class G, bool Resident>
const char* run_wgrad(const WgradDotArgs& args, const WgradPlan& plan, const WgradPointers& at, void* stream) {
  sm90::TensorMap map_a, map_b;
  if (const char* error = encode(&map_a, args.a, args.dtype, args.din, args.tokens, args.a_stride)) return error;
  if (const char* error = encode(&map_b, args.b, args.dtype, args.dout, args.tokens, args.b_stride)) return error;
  const auto kernel = wgrad_dot_kernel<T, G, Resident>;
  const int bytes = shared_bytes(plan, sizeof(G));
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int blocks = min(plan.units, device_attribute(cudaDevAttrMultiProcessorCount));
  MR1_LAUNCH(kernel, blocks, kWgradThreads, bytes, stream, map_a, map_b, plan, at);
  if (const char* failed = last_error()) return failed;
  if (plan.split > 0 && at.main_grad != nullptr) MR1_LAUNCH(add_parts_kernel<>, plan.split * 16, kConsumerThreads, 0, stream, plan, at);
  return last_error();
}

template <class T, class G>
const char* run_wgrad(const WgradDotArgs& args, const WgradPlan& plan, const WgradPointers& at, void* stream) {
  return (probes_fit(plan, sizeof(G)) ? run_wgrad<T, G, true> : run_wgrad<T, G, false>)(args, plan, at, stream);
}

// --- The plain path -----------------------------------------------------------------------------------------------------------------

int64_t add_and_dot_blocks(const AddAndDotArgs& args) { return ceil_div(args.rows * args.cols, kPerBlock); }

template <class S, class G>
const char* run_add_and_dot(const AddAndDotArgs& args, void* stream) {
  const bool four = args.cols % 4 == 0 && args.block_stride % 4 == 0 && args.g_stride % 4 == 0 && args.g_probe_stride % 4 == 0 &&
                    args.main_grad_stride % 4 == 0 && aligned(args.block, 16) && aligned(args.g, 4 * sizeof(G) < 16 ? 4 * sizeof(G) : 16) &&
                    aligned(args.main_grad, 16);
  const int blocks = static_cast<int>(add_and_dot_blocks(args));
  S* const partial = static_cast<S*>(args.workspace);
  if (four) MR1_LAUNCH((add_and_dot_kernel<S, G, 4>), blocks, kPlainThreads, 0, stream, args, partial);
  else MR1_LAUNCH((add_and_dot_kernel<S, G, 1>), blocks, kPlainThreads, 0, stream, args, partial);
  if (const char* error = last_error()) return error;
  if (args.probes > 0)
    MR1_LAUNCH(add_partial_kernel<S>, static_cast<int>(args.probes), kPlainThreads, 0, stream, static_cast<const S*>(partial), blocks,
               static_cast<int>(args.probes), static_cast<S*>(args.scores));
  return last_error();
}

template <class S, class X, class Y>
const char* run_row_dot(const RowDotArgs& args, void* stream) {
  constexpr int width = sizeof(X) == 2 ? 8 : 4;
  const bool wide = args.width % width == 0 && args.x_stride % width == 0 && args.y_stride % width == 0 && aligned(args.x, 16) && aligned(args.y, 16);
  S* const rows = static_cast<S*>(args.workspace);
  if (args.tokens > 0) {
    const int blocks = static_cast<int>(ceil_div(args.tokens, kPlainThreads / 32));
    if (wide) MR1_LAUNCH((row_dot_kernel<S, X, Y, width>), blocks, kPlainThreads, 0, stream, args, rows);
    else MR1_LAUNCH((row_dot_kernel<S, X, Y, 1>), blocks, kPlainThreads, 0, stream, args, rows);
    if (const char* error = last_error()) return error;
  }
  if (args.documents > 0)
    MR1_LAUNCH(document_sum_kernel<S>, static_cast<int>(args.documents), kPlainThreads, 0, stream, static_cast<const S*>(rows), args.cu_device,
               static_cast<S*>(args.scores), args.score_stride);
  return last_error();
}

}  // namespace

bool wgrad_dot_sm90_supported(const WgradDotArgs& args) {
  constexpr int64_t most = (int64_t{1} << 31) - kTile;
  const bool sixteen = args.dtype == DType::bf16 || args.dtype == DType::f16;
  const size_t g_element = args.g_dtype == DType::f32 ? 4 : 2;
  const bool types = sixteen && (args.g_dtype == args.dtype || args.g_dtype == DType::f32) && args.scores_dtype == DType::f32 &&
                     (args.main_grad == nullptr || args.main_grad_dtype == DType::f32);
  const bool sizes = args.din > 0 && args.dout > 0 && args.din < most && args.dout < most && args.tokens < most && args.documents < most &&
                     args.probes < most && ceil_div(args.din, kTile) * ceil_div(args.dout, kTile) < (1 << 24);
  // TMA: rows start at multiples of 16 bytes. Probes and main_grad: two neighbours are read at a time.
  const bool places = args.cu_device != nullptr && args.din % 2 == 0 && args.a_stride % 8 == 0 && args.b_stride % 8 == 0 && aligned(args.a, 16) &&
                      aligned(args.b, 16) && args.a_stride >= args.din && args.b_stride >= args.dout && args.g_stride % 2 == 0 &&
                      args.g_probe_stride % 2 == 0 && aligned(args.g, 2 * g_element) &&
                      (args.main_grad == nullptr || (args.main_grad_stride % 2 == 0 && aligned(args.main_grad, 8)));
  if (!types || !sizes || !places) return false;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9 || device_attribute(cudaDevAttrComputeCapabilityMinor) != 0) return false;
  if (!tensor_maps_available()) return false;
  const WgradPlan plan = plan_of(args);
  // Very many very short documents: the workspace would outgrow its use.
  return static_cast<int64_t>(plan.documents) * plan.probes < most && partial_floats(plan) <= (int64_t{1} << 28);
}

int64_t wgrad_dot_sm90_workspace(const WgradDotArgs& args) {
  const WgradPlan plan = plan_of(args);
  return partial_bytes(plan) + (args.main_grad != nullptr ? rest_floats(plan) * 4 : 0);
}

const char* wgrad_dot_sm90(const WgradDotArgs& args, void* stream) {
  if (!wgrad_dot_sm90_supported(args)) return "wgrad_dot_sm90: not for these arguments or this GPU";
  const WgradPlan plan = plan_of(args);
  const WgradPointers at{args.cu_device, args.g, args.g_stride, args.g_probe_stride, static_cast<float*>(args.main_grad), args.main_grad_stride,
                         static_cast<float*>(args.workspace), reinterpret_cast<float*>(static_cast<char*>(args.workspace) + partial_bytes(plan))};
  if (args.tokens > 0) {
    const bool wide = args.g_dtype == DType::f32;
    const char* error = args.dtype == DType::bf16 ? (wide ? run_wgrad<bf16, float> : run_wgrad<bf16, bf16>)(args, plan, at, stream)
                                                  : (wide ? run_wgrad<f16, float> : run_wgrad<f16, f16>)(args, plan, at, stream);
    if (error) return error;
  }
  const int scores = plan.documents * plan.probes;
  if (scores > 0)
    MR1_LAUNCH(sum_scores_kernel<>, scores, 256, 0, stream, plan, args.cu_device, static_cast<const float*>(at.partial), static_cast<float*>(args.scores));
  return last_error();
}

int64_t add_and_dot_workspace(const AddAndDotArgs& args) {
  return add_and_dot_blocks(args) * args.probes * (args.block_dtype == DType::f64 ? 8 : 4);
}

const char* add_and_dot(const AddAndDotArgs& args, void* stream) {
  if (args.rows <= 0 || args.cols <= 0) return nullptr;
  const bool f64 = args.block_dtype == DType::f64;
  if ((!f64 && args.block_dtype != DType::f32) || args.scores_dtype != args.block_dtype ||
      (args.main_grad != nullptr && args.main_grad_dtype != args.block_dtype) || f64 != (args.g_dtype == DType::f64))
    return "add_and_dot: block, main_grad and scores are all float32 (probes float32, bfloat16 or float16) or all float64";
  if (add_and_dot_blocks(args) >= (int64_t{1} << 31)) return "add_and_dot: block too large";
  switch (args.g_dtype) {
    case DType::f32: return run_add_and_dot<float, float>(args, stream);
    case DType::bf16: return run_add_and_dot<float, bf16>(args, stream);
    case DType::f16: return run_add_and_dot<float, f16>(args, stream);
    case DType::f64: return run_add_and_dot<double, double>(args, stream);
  }
  return "add_and_dot: unknown dtype";
}

int64_t row_dot_workspace(const RowDotArgs& args) { return args.tokens * (args.x_dtype == DType::f64 ? 8 : 4); }

const char* row_dot(const RowDotArgs& args, void* stream) {
  const bool wide = args.y_dtype == DType::f32;
  if (args.y_dtype != args.x_dtype && !(wide && args.x_dtype != DType::f64)) return "row_dot: y is of x's dtype or float32";
  switch (args.x_dtype) {
    case DType::f32: return run_row_dot<float, float, float>(args, stream);
    case DType::bf16: return (wide ? run_row_dot<float, bf16, float> : run_row_dot<float, bf16, bf16>)(args, stream);
    case DType::f16: return (wide ? run_row_dot<float, f16, float> : run_row_dot<float, f16, f16>)(args, stream);
    case DType::f64: return run_row_dot<double, double, double>(args, stream);
  }
  return "row_dot: unknown dtype";
}

}  // namespace mr1
