// `fastpo_kernels.pair_loss.native._native`: the passes and the finish as functions of Python.
//
// Tensors are handed over by address, kind and strides, so that nothing of torch is compiled in:
// the module serves every version of torch, and by Python's stable ABI every Python from 3.11 on.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <algorithm>
#include <vector>

#include "finish.h"
#include "rows.h"

namespace {

using namespace fastpo;

// Reads the items of a tuple of integers in order.
struct Integers {
  PyObject* tuple;
  Py_ssize_t at = 0;

  int64_t next() {
    PyObject* item = PyTuple_GetItem(tuple, at++);
    return item == nullptr ? 0 : PyLong_AsLongLong(item);
  }
  template <typename T>
  T* address() {
    return reinterpret_cast<T*>(next());
  }
  Shape shape() {
    Shape found;
    found.n_pairs = next();
    found.n_dims = int(next());
    if (found.n_dims < 1 || found.n_dims > kMaxDims) {
      PyErr_Format(PyExc_ValueError, "at most %d dimensions, got %d", kMaxDims, found.n_dims);
      found.n_dims = 1;
    }
    found.n_elements = 1;
    for (int k = 0; k < found.n_dims; ++k) found.n_elements *= found.sizes[k] = next();
    return found;
  }
  Rows rows(const Shape& shape) {
    Rows found;
    found.kind = Kind(next());
    if (found.kind == Kind::none) return found;
    for (char*& side : found.side) side = address<char>();
    if (found.kind == Kind::ready) return found;
    found.row = next();
    for (int k = 0; k < shape.n_dims; ++k) found.inner[k] = next();
    return found;
  }
};

Spec spec_of(Integers& integers, PyObject* numbers) {
  Spec spec;
  spec.objective = Objective(integers.next());
  spec.has_reference = integers.next();
  spec.normalize = Normalize(integers.next());
  spec.weigh = Weigh(integers.next());
  for (bool* flag : {&spec.quadratic_margin, &spec.baseline, &spec.safeguard, &spec.per_pair}) {
    *flag = integers.next();
  }
  double* fields[] = {&spec.options.a, &spec.options.b, &spec.options.c, &spec.rho,
      &spec.weight_scale, &spec.weight_intercept, &spec.shift_scale, &spec.margin_beta, &spec.share,
      &spec.sft_weight};
  Py_ssize_t k = 0;
  for (double* field : fields) {
    PyObject* item = PyTuple_GetItem(numbers, k++);
    *field = item == nullptr ? 0.0 : PyFloat_AsDouble(item);
  }
  return spec;
}

struct Forward {
  Shape shape;
  std::vector<Rows> sources;
  Rows target, mask;
  Given given;
  Results results;
  Spec spec;

  Forward(Integers& integers, PyObject* numbers) : shape(integers.shape()) {
    for (int64_t n = integers.next(); n > 0; --n) sources.push_back(integers.rows(shape));
    target = integers.rows(shape);
    mask = integers.rows(shape);
    const float** vectors[] = {
        &given.minority, &given.statistics, &given.sums, &given.pair_weight, &given.beta};
    for (const float** vector : vectors) *vector = integers.address<const float>();
    for (float** at : {&results.loss, &results.margin, &results.errors, &results.rest}) {
      *at = integers.address<float>();
    }
    spec = spec_of(integers, numbers);
  }

  void run() const {
    const int64_t n = shape.n_pairs;
    std::vector<float> errors(2 * sources.size() * n);
    std::vector<double> dots(n);
    for (size_t s = 0; s < sources.size(); ++s) {
      if (sources[s].kind != Kind::ready) continue;
      for (int side = 0; side < 2; ++side) {
        const float* known = reinterpret_cast<const float*>(sources[s].side[side]);
        std::copy(known, known + n, errors.begin() + (2 * s + side) * n);
      }
    }
    const bool reads = target.kind != Kind::none;
    double* products = spec.safeguard ? dots.data() : nullptr;
    if (reads) row_errors(shape, sources, target, mask, errors.data(), products);
    const Batch batch{n, int64_t(sources.size()), errors.data(), dots.data()};
    if (results.loss == nullptr) {
      partial_results(batch, spec, results.rest);
    } else {
      finish(batch, spec, given, results);
    }
  }
};

PyObject* forward(PyObject*, PyObject* arguments) {
  PyObject *integers, *numbers;
  if (!PyArg_ParseTuple(arguments, "O!O!", &PyTuple_Type, &integers, &PyTuple_Type, &numbers)) {
    return nullptr;
  }
  Integers reader{integers};
  const Forward pass(reader, numbers);
  if (PyErr_Occurred()) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  pass.run();
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject* gradient(PyObject*, PyObject* arguments) {
  PyObject* integers;
  if (!PyArg_ParseTuple(arguments, "O!", &PyTuple_Type, &integers)) return nullptr;
  Integers reader{integers};
  const Shape shape = reader.shape();
  Rows rows[4];  // policy, target, mask, gradient
  for (Rows& one : rows) one = reader.rows(shape);
  const float* coefficients = reader.address<const float>();
  const float* scale = reader.address<const float>();
  if (PyErr_Occurred()) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  const float by = scale == nullptr ? 1.0f : *scale;
  row_gradients(shape, rows[0], rows[1], rows[2], rows[3], coefficients, by);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyObject* use_threads(PyObject*, PyObject* address) {
  void* found = PyLong_AsVoidPtr(address);
  if (PyErr_Occurred()) return nullptr;
  set_parallel_for(reinterpret_cast<ParallelFor>(found));
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"forward", forward, METH_VARARGS, "Errors of rows, and the loss or the batch's sums."},
    {"gradient", gradient, METH_VARARGS, "The policy's gradient from the errors' coefficients."},
    {"use_threads", use_threads, METH_O, "Takes the address of torch's parallel loop, or 0."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native",
    "The pair losses on a CPU: see native/launch.py.", -1, methods, nullptr, nullptr, nullptr,
    nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
