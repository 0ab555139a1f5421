#include "bindings/array_argument.h"

#include <memory>
#include <string>

#include "core/check.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

// The DLPack ABI (dmlc/dlpack, version 0.8): only what a consumer of CPU tensors needs.
struct DlDevice {
  int32_t device_type;
  int32_t device_id;
};
struct DlDataType {
  uint8_t code;  // 0 int, 1 uint, 2 float, 4 bfloat
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
constexpr int32_t kDlCpu = 1;

bool dtype_from_dlpack(DlDataType type, DType* out) {
  const int key = type.code * 1000 + type.bits;
  switch (key) {
    case 8: *out = DType::kI8; return true;
    case 32: *out = DType::kI32; return true;
    case 64: *out = DType::kI64; return true;
    case 1008: *out = DType::kU8; return true;
    case 1032: *out = DType::kU32; return true;
    case 1064: *out = DType::kU64; return true;
    case 2016: *out = DType::kF16; return true;
    case 2032: *out = DType::kF32; return true;
    case 2064: *out = DType::kF64; return true;
    case 4016: *out = DType::kBF16; return true;
    default: return false;
  }
}

bool dtype_from_format(const std::string& format, Py_ssize_t item_bytes, DType* out) {
  std::string code = format;
  if (!code.empty() && (code[0] == '@' || code[0] == '=' || code[0] == '<')) code.erase(0, 1);
  if (code.size() != 1) return false;
  switch (code[0]) {
    case 'f': *out = DType::kF32; return true;
    case 'd': *out = DType::kF64; return true;
    case 'e': *out = DType::kF16; return true;
    case 'b': *out = DType::kI8; return true;
    case 'B':
    case 'c': *out = DType::kU8; return true;
    case 'i':
    case 'l':
    case 'q': *out = item_bytes == 8 ? DType::kI64 : DType::kI32; return item_bytes == 8 || item_bytes == 4;
    case 'I':
    case 'L':
    case 'Q': *out = item_bytes == 8 ? DType::kU64 : DType::kU32; return item_bytes == 8 || item_bytes == 4;
    default: return false;
  }
}

void check_ndim(const char* name, int64_t ndim) {
  PARTITA_CHECK(ndim <= TensorView::kMaxDims, name, ": got ", ndim, " dimensions, wanted at most ", TensorView::kMaxDims);
}

}  // namespace

ArrayArgument::ArrayArgument(py::handle object, const char* name, bool writable) {
  view_.name = name;
  if (from_array_interface(object, writable) || from_dlpack(object) || from_buffer(object, writable)) return;
  throw TypeMismatch(concat(name, ": got ", Py_TYPE(object.ptr())->tp_name,
                            ", wanted an array that speaks DLPack or the buffer protocol"));
}

// NumPy arrays, ml_dtypes' bfloat16 among them (whose type the buffer protocol cannot name).
bool ArrayArgument::from_array_interface(py::handle object, bool writable) {
  if (!py::hasattr(object, "__array_interface__")) return false;
  const py::dict interface = object.attr("__array_interface__");
  const std::string typestr = py::str(interface["typestr"]);
  const std::string dtype_text = py::hasattr(object, "dtype") ? std::string(py::str(object.attr("dtype"))) : "";
  if (dtype_text == "bfloat16") {
    view_.dtype = DType::kBF16;
  } else {
    PARTITA_CHECK(typestr[0] != '>', view_.name, ": got big-endian data, wanted the machine's byte order");
    static const std::pair<const char*, DType> kTypes[] = {
        {"f4", DType::kF32}, {"f2", DType::kF16}, {"f8", DType::kF64}, {"i1", DType::kI8}, {"u1", DType::kU8},
        {"i4", DType::kI32}, {"i8", DType::kI64}, {"u4", DType::kU32}, {"u8", DType::kU64}};
    bool known = false;
    for (const auto& [code, dtype] : kTypes)
      if (typestr.substr(1) == code) view_.dtype = dtype, known = true;
    if (!known) throw TypeMismatch(concat(view_.name, ": got dtype ", dtype_text.empty() ? typestr : dtype_text,
                                          ", wanted a real number type of 8 to 64 bits or bfloat16"));
  }
  const py::tuple data = interface["data"];
  PARTITA_CHECK(!writable || !data[1].cast<bool>(), view_.name, ": got a read-only array, wanted a writable one");
  view_.data = reinterpret_cast<void*>(data[0].cast<uintptr_t>());
  const py::tuple shape = interface["shape"];
  check_ndim(view_.name, static_cast<int64_t>(shape.size()));
  view_.ndim = static_cast<int>(shape.size());
  const int64_t item_bytes = static_cast<int64_t>(dtype_bytes(view_.dtype));
  for (int d = 0; d < view_.ndim; ++d) view_.shape[d] = shape[d].cast<int64_t>();
  const py::object strides = interface.contains("strides") ? py::object(interface["strides"]) : py::none();
  int64_t running = 1;
  for (int d = view_.ndim - 1; d >= 0; --d) {
    view_.strides[d] = strides.is_none() ? running : py::tuple(strides)[d].cast<int64_t>() / item_bytes;
    running *= view_.shape[d];
  }
  owner_ = py::reinterpret_borrow<py::object>(object);
  return true;
}

bool ArrayArgument::from_dlpack(py::handle object) {
  if (!py::hasattr(object, "__dlpack__")) return false;
  const py::capsule capsule = object.attr("__dlpack__")();
  PARTITA_CHECK(std::string(capsule.name()) == "dltensor", view_.name, ": got a DLPack capsule named '", capsule.name(),
                "', wanted 'dltensor'");
  auto* managed = capsule.get_pointer<DlManagedTensor>();
  const DlTensor& tensor = managed->tensor;
  PARTITA_CHECK(tensor.device.device_type == kDlCpu, view_.name, ": got an array on DLPack device type ",
                tensor.device.device_type, ", wanted one in CPU memory");
  check_ndim(view_.name, tensor.ndim);
  if (tensor.dtype.lanes != 1 || !dtype_from_dlpack(tensor.dtype, &view_.dtype))
    throw TypeMismatch(concat(view_.name, ": got DLPack type code ", int(tensor.dtype.code), " with ",
                              int(tensor.dtype.bits), " bits, wanted a real number type"));
  view_.data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  view_.ndim = tensor.ndim;
  int64_t running = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    view_.shape[d] = tensor.shape[d];
    view_.strides[d] = tensor.strides ? tensor.strides[d] : running;
    running *= tensor.shape[d];
  }
  // An unconsumed capsule frees the tensor itself; holding both keeps the memory alive.
  owner_ = py::make_tuple(capsule, object);
  return true;
}

bool ArrayArgument::from_buffer(py::handle object, bool writable) {
  if (!PyObject_CheckBuffer(object.ptr())) return false;
  const py::buffer_info info = py::reinterpret_borrow<py::buffer>(object).request(writable);
  if (!dtype_from_format(info.format, info.itemsize, &view_.dtype))
    throw TypeMismatch(concat(view_.name, ": got buffer format '", info.format, "', wanted a real number type"));
  check_ndim(view_.name, info.ndim);
  view_.data = info.ptr;
  view_.ndim = static_cast<int>(info.ndim);
  for (int d = 0; d < view_.ndim; ++d) {
    view_.shape[d] = info.shape[d];
    view_.strides[d] = info.strides[d] / info.itemsize;
  }
  owner_ = py::reinterpret_borrow<py::object>(object);
  return true;
}

}  // namespace partita::bindings
