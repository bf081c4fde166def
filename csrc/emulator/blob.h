// Arrays in a file: [u64 bytes][bytes] ... one after the other, as tests/csrc/emulator.py writes and reads them.
//
//   int main(int argc, char** argv) {
//     mr1_emu::Blobs blobs(argc, argv);                       // run_x in.bin out.bin seed
//     const auto shape = blobs.take<int64_t>();               // in the order Python gave them
//     auto x = blobs.take<float>();                           // an Array<float>: exact bounds under ASan
//     auto y = mr1_emu::output<float>(n);                     // every byte 0xFF: what a kernel forgets is NaN
//     MR1_LAUNCH(kernel, grid, block, 0, nullptr, y.data(), x.data());
//     blobs.give(y);
//     return blobs.done();                                    // all input used? then the output is written
//   }
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda_emu.h"

namespace mr1_emu {

// Memory as a GPU allocation has it: aligned to 256 bytes. It ends exactly after its last element. Reinterpret an
// array of 16-bit words as bf16 by take<mr1::bf16>(): only sizes are checked.
template <class T>
class Array {
 public:
  explicit Array(size_t n) : size_(n) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, std::max<size_t>(n * sizeof(T), 1)) != 0) fail("no memory for %zu bytes", n * sizeof(T));
    data_.reset(static_cast<T*>(memory));
    races::watch(memory, n * sizeof(T), false, "an array in global memory");
  }
  T* data() { return size_ ? data_.get() : nullptr; }  // an empty tensor's pointer is null
  const T* data() const { return size_ ? data_.get() : nullptr; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_.get()[i]; }
  const T& operator[](size_t i) const { return data_.get()[i]; }
  T* begin() { return data_.get(); }
  T* end() { return data_.get() + size_; }
  const T* begin() const { return data_.get(); }
  const T* end() const { return data_.get() + size_; }

 private:
  struct Free {
    void operator()(T* p) const {
      races::unwatch(p);
      std::free(static_cast<void*>(p));
    }
  };
  size_t size_;
  std::unique_ptr<T, Free> data_;
};

template <class T>
Array<T> output(size_t n) {
  Array<T> a(n);
  if (n) std::memset(static_cast<void*>(a.data()), 0xff, n * sizeof(T));
  return a;
}

class Blobs {
 public:
  Blobs(int argc, char** argv) {
    if (argc != 4) fail("usage: %s in.bin out.bin seed", argc ? argv[0] : "run");
    options.seed = std::strtoull(argv[3], nullptr, 10);
    in_ = std::fopen(argv[1], "rb");
    if (!in_) fail("can not read %s", argv[1]);
    out_name_ = argv[2];
  }
  Blobs(const Blobs&) = delete;
  ~Blobs() {
    if (in_) std::fclose(in_);
  }

  template <class T>
  Array<T> take() {
    uint64_t bytes = 0;
    if (std::fread(&bytes, sizeof bytes, 1, in_) != 1) fail("input %u: there are no more arrays", taken_);
    if (bytes % sizeof(T)) fail("input %u: %llu bytes are no whole number of %zu-byte elements", taken_, static_cast<unsigned long long>(bytes), sizeof(T));
    Array<T> a(bytes / sizeof(T));
    if (bytes && std::fread(static_cast<void*>(a.data()), 1, bytes, in_) != bytes) fail("input %u: the file ends early", taken_);
    ++taken_;
    return a;
  }

  template <class T>
  void give(const Array<T>& a) {
    const uint64_t bytes = a.size() * sizeof(T);
    const auto* head = reinterpret_cast<const unsigned char*>(&bytes);
    out_.insert(out_.end(), head, head + sizeof bytes);
    if (bytes) {
      const auto* body = reinterpret_cast<const unsigned char*>(a.data());
      out_.insert(out_.end(), body, body + bytes);
    }
  }

  int done() {
    if (std::fgetc(in_) != EOF) fail("input %u was not used", taken_);
    std::FILE* out = std::fopen(out_name_, "wb");
    if (!out || std::fwrite(out_.data(), 1, out_.size(), out) != out_.size() || std::fclose(out) != 0) fail("can not write %s", out_name_);
    return 0;
  }

 private:
  std::FILE* in_ = nullptr;
  const char* out_name_ = nullptr;
  unsigned taken_ = 0;
  std::vector<unsigned char> out_;
};

}  // namespace mr1_emu
