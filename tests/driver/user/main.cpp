// A C++ program with captured runs and no Python: user <driver library>. The graph that it runs
// clears the first number of a buffer; on the stand-in driver, host memory is device memory.
#include <dlms/graphs.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

using namespace dlms::cuda;

namespace {

Graph clearing(void* at, Context context) {
  const Driver& d = driver();
  Graph graph = nullptr;
  GraphNode node = nullptr;
  MemsetNode zero;
  zero.dst = reinterpret_cast<DevicePtr>(at);
  d.check(d.graph_create(&graph, 0), "cuGraphCreate");
  d.check(d.add_memset(&node, graph, nullptr, 0, &zero, context), "cuGraphAddMemsetNode");
  return graph;
}

// Threads share a run: each gets its own values back.
int check_run() {
  const PrimaryContext context(driver(), 0);
  std::vector<float> buffer(4);
  const Graph graph = clearing(buffer.data(), context.get());
  GraphRun run(graph, {{buffer.data(), 16}}, {buffer.data(), 16}, 0);
  driver().graph_destroy(graph);
  std::atomic<int> wrong{0};
  const auto work = [&](float number) {
    std::vector<float> input(4, number), expected = {0, number, number, number}, result(4);
    for (int n = 0; n < 200; ++n) {
      run.launch({{input.data(), 16}}, result.data(), nullptr);
      if (result != expected) ++wrong;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back(work, static_cast<float>(i + 1));
  for (std::thread& thread : threads) thread.join();
  return wrong == 0 && run.launches() == 800 ? 0 : 1;
}

int check_ring() {
  DeviceRing ring(3, 8, 0);
  for (int n = 0; n < 5; ++n) {
    std::memset(ring.slot(ring.next_slot()), n, ring.slot_bytes());
    ring.wrote(ring.next_slot());
  }
  return *static_cast<char*>(ring.past(0)) == 4 && *static_cast<char*>(ring.past(2)) == 2 ? 0 : 2;
}

// Many threads on one small cache: what a thread finds is what was put under that key.
int check_cache() {
  GraphCache cache(40, 4);
  std::atomic<int> wrong{0};
  const auto work = [&](int seed) {
    for (int n = 0; n < 2000; ++n) {
      const int number = (n * 7 + seed) % 9;
      const GraphKey key{std::string("network") + std::to_string(number), 8, 1};
      GraphCache::Value value = cache.find(key);
      while (value == nullptr) {
        const GraphCache::Answer answer = cache.claim(key);
        value = answer.value;
        if (answer.claim != GraphCache::Claim::kMine) continue;
        value = std::make_shared<int>(number);
        cache.put(key, key, value, 10);
      }
      if (*static_cast<int*>(value.get()) != number) ++wrong;
      if (n % 100 == 0) cache.invalidate(n % 200 == 0 ? 0 : 1);
      if (n % 50 == 0 && cache.stats().entries > 4) ++wrong;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
  const GraphCache::Stats stats = cache.stats();
  return wrong == 0 && stats.bytes == 10 * stats.entries && stats.entries <= 4 ? 0 : 4;
}

} // namespace

int main(int, char** arguments) {
  use_driver(arguments[1]);
  const int status = check_run() | check_ring() | check_cache();
  std::printf("status %d\n", status);
  return status;
}
