// Which pages hold the tokens of which sequence: the bookkeeping of a cache, without its memory.
#pragma once

#include <span>
#include <vector>

#include "quantloom/dtype.hpp"
#include "quantloom/kv_cache/kv_layout.hpp"

namespace quantloom {

// What a cache holds, in bytes.
struct KVUsage {
  int64_t tokens = 0;      // of all sequences together
  int64_t coded_keys = 0;  // tokens whose keys are codes
  int64_t coded_values = 0;
  int64_t code_bytes = 0;      // codes and parameters of those tokens
  int64_t exact_bytes = 0;     // exact keys and values in use
  int64_t page_bytes = 0;      // pages in use, whole
  int64_t reserved_bytes = 0;  // all memory of the cache
};

// Pages lie in slabs of memory. Each belongs to one sequence, to several that share it after a reordering, or
// to none; one that is written to belongs to one.
class KVPages {
 public:
  struct Place {
    int32_t slab = 0;
    int32_t index = 0;
  };
  // Page number `page` of a sequence lies at `to` from now on: with zeros, or what is at `from` if that is
  // not below 0.
  struct Change {
    int64_t sequence = 0;
    int64_t page = 0;
    int32_t to = 0;
    int32_t from = -1;
  };

  KVPages(const KVFormat& format, const KVLayout& layout, int64_t sequences)
      : format_(format), layout_(layout), sequences_(static_cast<size_t>(sequences)) {}

  int64_t sequences() const { return std::ssize(sequences_); }
  int64_t length(int64_t sequence) const { return sequences_[static_cast<size_t>(sequence)].length; }
  void set_length(int64_t sequence, int64_t length) {
    sequences_[static_cast<size_t>(sequence)].length = length;
  }
  // Tokens, counted from the first that is not kept exact, whose keys or values are codes.
  int64_t coded(KVSide side, int64_t sequence) const { return coded_of(side, length(sequence)); }
  // The page that holds page number `page` of a sequence, and how many it has.
  int32_t page(int64_t sequence, int64_t page) const {
    return sequences_[static_cast<size_t>(sequence)].pages[static_cast<size_t>(page)];
  }
  int64_t page_count(int64_t sequence) const {
    return std::ssize(sequences_[static_cast<size_t>(sequence)].pages);
  }
  Place place(int32_t page) const { return places_[static_cast<size_t>(page)]; }
  int64_t slabs() const { return slabs_; }

  // Pages of a sequence of `tokens` tokens, whatever is exact of them.
  int64_t pages_of(int64_t tokens) const;
  // Pages that another slab must have before each sequence s can be `lengths`[s] tokens long: 0, or some more
  // than are missing. Throws InvalidArgument naming `capacity` where numbers of pages end.
  int64_t missing_pages(std::span<const int64_t> lengths) const;
  void add_slab(int64_t pages);
  // Makes the pages that tokens up to `lengths`[s] are written to the sequence's own.
  std::vector<Change> own(std::span<const int64_t> lengths);
  // The length that a sequence may reach without own().
  int64_t room(int64_t sequence) const;

  // Sequence s becomes what sequence sources[s] was; their number may change.
  void reorder(std::span<const int64_t> sources);
  // Gives all pages back.
  void clear();

  // Without reserved_bytes.
  KVUsage usage(int64_t kv_heads, DType dtype) const;

 private:
  struct Sequence {
    int64_t length = 0;
    std::vector<int32_t> pages;
  };
  struct Run {
    int64_t begin = 0;
    int64_t end = 0;
  };

  int64_t coded_of(KVSide side, int64_t length) const;
  Run written_pages(const Sequence& sequence, int64_t length) const;
  bool owns(const Sequence& sequence, int64_t page) const;
  // Throws InvalidArgument if there are not so many numbers of pages left.
  void require_numbers(int64_t pages) const;
  int32_t take_page();
  void release(const Sequence& sequence);

  KVFormat format_;
  KVLayout layout_;
  std::vector<Sequence> sequences_;
  std::vector<Place> places_;        // of each page
  std::vector<int32_t> owners_;      // sequences that share it
  std::vector<int32_t> free_pages_;  // the next one last
  int64_t slabs_ = 0;
};

}  // namespace quantloom
