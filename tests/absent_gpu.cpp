// What a build of torch without CUDA lacks for holding fake cuda tensors: a device guard and hooks, so that autograd
// finds streams to order, and the choice of attention kernels. Nothing here computes or holds memory; see fake_cuda.py.
// To be loaded before libtorch_python: the hooks are asked for once.
#include <ATen/SDPBackend.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceType;
using c10::Stream;

// one device with one stream
struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
};

c10::impl::DeviceGuardImplRegistrar guard(DeviceType::CUDA, new Guard());

// The conditions of aten/src/ATen/native/transformers/cuda/sdp_utils.cpp that depend on the call alone: flash attention
// takes no mask and 16 bits and knows grouped queries, the memory-efficient kernel masks and fp32 but no groups.
int64_t choose(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
               const std::optional<at::Tensor>& mask, double dropout, bool causal, std::optional<double> scale,
               bool grouped) {
  const bool rows = query.stride(-1) == 1 && key.stride(-1) == 1 && value.stride(-1) == 1;
  const bool half = query.scalar_type() == at::kHalf || query.scalar_type() == at::kBFloat16;
  const bool alike = query.scalar_type() == key.scalar_type() && query.scalar_type() == value.scalar_type();
  const bool square = !causal || query.size(-2) == key.size(-2);
  const auto head_dim = query.size(-1);
  if (rows && half && alike && square && !mask.has_value() && head_dim <= 256) {
    return static_cast<int64_t>(at::SDPBackend::flash_attention);
  }
  const bool same_heads = query.size(1) == key.size(1) && key.size(1) == value.size(1);
  if (rows && alike && same_heads && head_dim % (half ? 8 : 4) == 0) {
    return static_cast<int64_t>(at::SDPBackend::efficient_attention);
  }
  return static_cast<int64_t>(at::SDPBackend::math);
}

}  // namespace

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

namespace native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &choose)
}

}  // namespace at
