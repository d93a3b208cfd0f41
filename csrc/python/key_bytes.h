// Bytes written one after the other, and a digest of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace dlms {

// Writes into memory that the thread keeps for its next key; `which` tells two apart.
class Bytes {
 public:
  explicit Bytes(int which) : memory_(scratch(which)) {}
  template <class T>
  void put(const T& number) {
    put(&number, sizeof number);
  }
  // A tag and its value.
  template <class T>
  void put(char tag, const T& number) {
    char both[1 + sizeof number];
    both[0] = tag;
    std::memcpy(both + 1, &number, sizeof number);
    put(both, sizeof both);
  }
  void put(const void* data, size_t bytes) {
    if (memory_.size() - used_ < bytes) memory_.resize(2 * memory_.size() + bytes);
    std::memcpy(memory_.data() + used_, data, bytes);
    used_ += bytes;
  }
  const char* data() const { return memory_.data(); }
  size_t size() const { return used_; }
  void clear() { used_ = 0; }

 private:
  static std::vector<char>& scratch(int which) {
    static thread_local std::vector<char> memory[2] = {
        std::vector<char>(1 << 14), std::vector<char>(1 << 14)};
    return memory[which];
  }
  std::vector<char>& memory_;
  size_t used_ = 0;
};

// 128 bits that stand for many bytes: two chains of 64x64 -> 128 bit products, each of which sees
// every byte. Settings are compared by it, so it must not collide by chance; nobody makes them
// collide.
struct Digest {
  uint64_t first = 0x243F6A8885A308D3ull, second = 0x13198A2E03707344ull; // digits of pi

  static Digest of(const Bytes& bytes) {
    Digest digest;
    size_t at = 0;
    for (; at + 16 <= bytes.size(); at += 16) digest.mix(bytes.data() + at);
    char rest[16] = {};
    std::memcpy(rest, bytes.data() + at, bytes.size() - at);
    digest.mix(rest);
    const uint64_t size[2] = {bytes.size(), ~static_cast<uint64_t>(bytes.size())};
    digest.mix(reinterpret_cast<const char*>(size));
    return digest;
  }

 private:
  static uint64_t fold(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }
  void mix(const char* block) {
    uint64_t low, high;
    std::memcpy(&low, block, 8);
    std::memcpy(&high, block + 8, 8);
    first = fold(first ^ low, high ^ 0xA4093822299F31D1ull) + (second << 1 | second >> 63);
    second =
        fold(second ^ high, low ^ 0x082EFA98EC4E6C89ull) ^ (low + high * 0x9E3779B97F4A7C15ull);
  }
};

} // namespace dlms
