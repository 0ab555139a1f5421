#include "bindings/array_argument.h"

#include <memory>
#include <string>

#include "core/check.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

// The DLPack ABI (dmlc/dlpack, unversioned 0.8 and versioned 1.x): only what a consumer of CPU tensors needs.
struct DlDevice {
  int32_t device_type;
  int32_t device_id;
};
struct DlDataType {
  uint8_t code;  // 0 int, 1 uint, 2 float, 4 bfloat, 10 float8_e4m3fn
  uint8_t bits;
  uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DlManagedTensor {
  DlTensor tensor;
  void* manager_context;
  void (*deleter)(DlManagedTensor*);
};
struct DlManagedTensorVersioned {
  uint32_t major_version;
  uint32_t minor_version;
  void* manager_context;
  void (*deleter)(DlManagedTensorVersioned*);
  uint64_t flags;
  DlTensor tensor;
};
constexpr int32_t kDlCpu = 1;
constexpr int32_t kDlCuda = 2;
constexpr int32_t kDlCudaHost = 3;  // pinned, but the CPU's
constexpr uint64_t kDlReadOnly = 1;

const char* device_type_name(int32_t type) {
  switch (type) {
    case 2:
      return " (CUDA)";
    case 8:
      return " (Metal)";
    case 10:
      return " (ROCm)";
    case 13:
      return " (CUDA managed)";
    default:
      return "";
  }
}

bool dtype_from_dlpack(DlDataType type, DType* out) {
  const int key = type.code * 1000 + type.bits;
  switch (key) {
    case 8:
      *out = DType::kI8;
      return true;
    case 32:
      *out = DType::kI32;
      return true;
    case 64:
      *out = DType::kI64;
      return true;
    case 1008:
      *out = DType::kU8;
      return true;
    case 1032:
      *out = DType::kU32;
      return true;
    case 1064:
      *out = DType::kU64;
      return true;
    case 2016:
      *out = DType::kF16;
      return true;
    case 2032:
      *out = DType::kF32;
      return true;
    case 2064:
      *out = DType::kF64;
      return true;
    case 4016:
      *out = DType::kBF16;
      return true;
    case 10008:
      *out = DType::kE4M3;
      return true;
    default:
      return false;
  }
}

bool dtype_from_format(const std::string& format, Py_ssize_t item_bytes, DType* out) {
  std::string code = format;
  if (!code.empty() && (code[0] == '@' || code[0] == '=' || code[0] == '<')) code.erase(0, 1);
  if (code.size() != 1) return false;
  switch (code[0]) {
    case 'f':
      *out = DType::kF32;
      return true;
    case 'd':
      *out = DType::kF64;
      return true;
    case 'e':
      *out = DType::kF16;
      return true;
    case 'b':
      *out = DType::kI8;
      return true;
    case 'B':
    case 'c':
      *out = DType::kU8;
      return true;
    case 'i':
    case 'l':
    case 'q':
      *out = item_bytes == 8 ? DType::kI64 : DType::kI32;
      return item_bytes == 8 || item_bytes == 4;
    case 'I':
    case 'L':
    case 'Q':
      *out = item_bytes == 8 ? DType::kU64 : DType::kU32;
      return item_bytes == 8 || item_bytes == 4;
    default:
      return false;
  }
}

void check_ndim(const char* name, int64_t ndim) {
  PARTITA_CHECK(ndim <= TensorView::kMaxDims, name, ": got ", ndim, " dimensions, wanted at most ",
                TensorView::kMaxDims);
}

int64_t element_stride(const char* name, int64_t stride_bytes, DType dtype) {
  const auto item_bytes = static_cast<int64_t>(dtype_bytes(dtype));
  PARTITA_CHECK(stride_bytes % item_bytes == 0, name, ": got strides that are no multiple of its elements' ",
                item_bytes, " bytes, wanted an array of plain elements");
  return stride_bytes / item_bytes;
}

void check_writable(const char* name, bool wanted, bool is_read_only) {
  PARTITA_CHECK(!wanted || !is_read_only, name, ": got a read-only array, wanted a writable one");
}

[[noreturn]] void throw_big_endian(const char* name) {
  throw_value_error(name, ": got big-endian data, wanted the machine's byte order");
}

}  // namespace

ArrayArgument::ArrayArgument(py::handle object, const char* name, bool writable) {
  view_.name = name;
  if (!from_array_interface(object, writable) && !from_dlpack(object, writable) && !from_buffer(object, writable))
    throw TypeMismatch(concat(name, ": got ", Py_TYPE(object.ptr())->tp_name,
                              ", wanted an array that speaks DLPack or the buffer protocol"));
  PARTITA_CHECK(view_.num_elements() == 0 || reinterpret_cast<uintptr_t>(view_.data) % dtype_bytes(view_.dtype) == 0,
                name, ": got an address that is no multiple of its elements' ", dtype_bytes(view_.dtype),
                " bytes, wanted an aligned array");
}

ArrayArgument ArrayArgument::on_cuda(py::handle object, const char* name, int cuda_ordinal) {
  ArrayArgument argument;
  argument.view_.name = name;
  argument.cuda_ordinal_ = cuda_ordinal;
  if (!argument.from_dlpack(object, /*writable=*/false))
    throw TypeMismatch(concat(name, ": got ", Py_TYPE(object.ptr())->tp_name,
                              ", wanted a GpuArray or an array that speaks DLPack on CUDA device ", cuda_ordinal));
  return argument;
}

void ArrayArgument::check_dlpack_device(int32_t type, int32_t ordinal) const {
  if (cuda_ordinal_ >= 0)
    PARTITA_CHECK(type == kDlCuda && ordinal == cuda_ordinal_, view_.name, ": got an array on DLPack device type ",
                  type, device_type_name(type), ", number ", ordinal, ", wanted one on CUDA device ", cuda_ordinal_);
  else
    PARTITA_CHECK(type == kDlCpu || type == kDlCudaHost, view_.name, ": got an array on DLPack device type ", type,
                  device_type_name(type), ", wanted one in CPU memory");
}

// NumPy arrays, ml_dtypes' bfloat16 and float8_e4m3fn among them (whose types the buffer protocol cannot name).
bool ArrayArgument::from_array_interface(py::handle object, bool writable) {
  if (!py::hasattr(object, "__array_interface__")) return false;
  try {
    read_array_interface(object, writable);
  } catch (const py::error_already_set& error) {
    throw TypeMismatch(concat(view_.name, ": got a malformed __array_interface__ (", error.what(), ")"));
  } catch (const py::builtin_exception& error) {  // a failed cast
    throw TypeMismatch(concat(view_.name, ": got a malformed __array_interface__ (", error.what(), ")"));
  }
  return true;
}

void ArrayArgument::read_array_interface(py::handle object, bool writable) {
  const py::dict interface = object.attr("__array_interface__");
  const std::string typestr = py::str(interface["typestr"]);
  static const std::pair<const char*, DType> kTypes[] = {{"f4", DType::kF32}, {"f2", DType::kF16}, {"f8", DType::kF64},
                                                         {"i1", DType::kI8},  {"u1", DType::kU8},  {"i4", DType::kI32},
                                                         {"i8", DType::kI64}, {"u4", DType::kU32}, {"u8", DType::kU64}};
  bool is_known = false;
  for (const auto& [code, dtype] : kTypes)
    if (!typestr.empty() && typestr.compare(1, std::string::npos, code) == 0) view_.dtype = dtype, is_known = true;
  if (!is_known) {
    // ml_dtypes' types all look like raw bytes here; only the dtype's name (slow to ask for) tells them apart.
    const std::string dtype_text = py::hasattr(object, "dtype") ? std::string(py::str(object.attr("dtype"))) : typestr;
    if (dtype_text != "bfloat16" && dtype_text != "float8_e4m3fn")
      throw TypeMismatch(concat(view_.name, ": got dtype ", dtype_text,
                                ", wanted a real number type of 8 to 64 bits, bfloat16 or float8_e4m3fn"));
    view_.dtype = dtype_text == "bfloat16" ? DType::kBF16 : DType::kE4M3;
  }
  if (typestr[0] == '>') throw_big_endian(view_.name);
  const py::tuple data = interface["data"];
  check_writable(view_.name, writable, data[1].cast<bool>());
  view_.data = reinterpret_cast<void*>(data[0].cast<uintptr_t>());
  const py::tuple shape = interface["shape"];
  check_ndim(view_.name, static_cast<int64_t>(shape.size()));
  view_.ndim = static_cast<int>(shape.size());
  for (int d = 0; d < view_.ndim; ++d) view_.shape[d] = shape[d].cast<int64_t>();
  const py::object strides = interface.contains("strides") ? py::object(interface["strides"]) : py::none();
  int64_t running = 1;
  for (int d = view_.ndim - 1; d >= 0; --d) {
    view_.strides[d] =
        strides.is_none() ? running : element_stride(view_.name, py::tuple(strides)[d].cast<int64_t>(), view_.dtype);
    running *= view_.shape[d];
  }
  owner_ = py::make_tuple(object, interface);
}

bool ArrayArgument::from_dlpack(py::handle object, bool writable) {
  if (!py::hasattr(object, "__dlpack__")) return false;
  py::object capsule;
  try {
    // The device first: exporting a GPU tensor would wait for its stream.
    if (py::hasattr(object, "__dlpack_device__")) {
      const auto type = py::tuple(object.attr("__dlpack_device__")())[0].cast<int32_t>();
      check_dlpack_device(type, py::tuple(object.attr("__dlpack_device__")())[1].cast<int32_t>());
    }
    try {
      // Only a versioned capsule can say that it is read-only; older producers do not know the argument.
      capsule = object.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0));
    } catch (const py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;
      capsule = object.attr("__dlpack__")();
    }
  } catch (const py::error_already_set& error) {
    throw_value_error(view_.name, ": got an array that cannot be exported by DLPack (", error.what(), ")");
  }
  const DlTensor* tensor = nullptr;
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    const auto* managed =
        static_cast<DlManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    PARTITA_CHECK(managed->major_version == 1, view_.name, ": got a DLPack capsule of version ", managed->major_version,
                  ".", managed->minor_version, ", wanted 1.x");
    check_writable(view_.name, writable, managed->flags & kDlReadOnly);
    tensor = &managed->tensor;
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    tensor = &static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor;
  } else {
    throw TypeMismatch(concat(view_.name, ": got ", Py_TYPE(capsule.ptr())->tp_name,
                              " from __dlpack__, wanted a capsule named dltensor or dltensor_versioned"));
  }
  check_dlpack_device(tensor->device.device_type, tensor->device.device_id);
  check_ndim(view_.name, tensor->ndim);
  if (tensor->dtype.lanes != 1 || !dtype_from_dlpack(tensor->dtype, &view_.dtype))
    throw TypeMismatch(concat(view_.name, ": got DLPack type code ", int(tensor->dtype.code), " with ",
                              int(tensor->dtype.bits),
                              " bits, wanted a real number type of 8 to 64 bits, bfloat16 or float8_e4m3fn"));
  view_.data = static_cast<std::byte*>(tensor->data) + tensor->byte_offset;
  view_.ndim = tensor->ndim;
  int64_t running = 1;
  for (int d = tensor->ndim - 1; d >= 0; --d) {
    view_.shape[d] = tensor->shape[d];
    view_.strides[d] = tensor->strides ? tensor->strides[d] : running;
    running *= tensor->shape[d];
  }
  // The capsule is not consumed: it frees the tensor itself when it is let go.
  owner_ = py::make_tuple(capsule, object);
  return true;
}

bool ArrayArgument::from_buffer(py::handle object, bool writable) {
  if (!PyObject_CheckBuffer(object.ptr())) return false;
  try {
    buffer_ = std::make_unique<py::buffer_info>(py::reinterpret_borrow<py::buffer>(object).request());
  } catch (const py::error_already_set& error) {
    throw_value_error(view_.name, ": got a buffer that cannot be read (", error.what(), ")");
  }
  check_writable(view_.name, writable, buffer_->readonly);
  const std::string& format = buffer_->format;
  const bool big_endian = !format.empty() && (format[0] == '>' || format[0] == '!');
  if (!dtype_from_format(big_endian ? format.substr(1) : format, buffer_->itemsize, &view_.dtype))
    throw TypeMismatch(
        concat(view_.name, ": got buffer format '", format, "', wanted a real number type of 8 to 64 bits"));
  if (big_endian) throw_big_endian(view_.name);
  check_ndim(view_.name, buffer_->ndim);
  view_.data = buffer_->ptr;
  view_.ndim = static_cast<int>(buffer_->ndim);
  for (int d = 0; d < view_.ndim; ++d) {
    view_.shape[d] = buffer_->shape[d];
    view_.strides[d] = element_stride(view_.name, buffer_->strides[d], view_.dtype);
  }
  owner_ = py::reinterpret_borrow<py::object>(object);
  return true;
}

DType dtype_named(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(DType::kE4M3); ++i)
    if (name == dtype_name(static_cast<DType>(i))) return static_cast<DType>(i);
  throw_value_error("dtype: got '", name, "', wanted a real number type of 8 to 64 bits, bfloat16 or float8_e4m3fn");
}

}  // namespace partita::bindings
