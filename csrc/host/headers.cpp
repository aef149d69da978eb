// The headers of tar shards: names, places and sizes of their members, and format and size of their images.
//
// mvle/data/headers.py has the form of the result, the rules, and a twin in Python that gives the same for every file,
// well-formed or not; tests hold the two against each other. Nothing here trusts a number that it reads: a place is
// compared with the file's size before it is used, sums cannot overflow, and no record is read whole that is longer than
// RECORD. Files are read by pread, a window at a time: a shard that is cut while it is mapped would end the process.
#include <fcntl.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace py = pybind11;

namespace {

constexpr int FORM = 2;  // of the result and the rules; headers.py takes no other
constexpr int64_t BLOCK = 512;
constexpr int64_t WINDOW = 4096;      // bytes of one read: a header, and what begins behind it
constexpr int64_t RECORD = 1 << 20;   // bytes of the longest name or pax record that is read
constexpr int SEGMENTS = 4096;        // of a JPEG, before its size must have come

// Formats by their number in mvle/data/decode.py.
enum Format : uint8_t { OTHER = 0, JPEG = 1, PNG = 2, WEBP = 3, GIF = 4, BMP = 5 };

struct Image {
  uint8_t format = OTHER, orientation = 1;
  int32_t width = 0, height = 0;
};

// What a shard holds, a column a field, or why it does not: `error` names the rule, `at` and `number` are its figures.
struct Found {
  std::string names, error;
  std::vector<int64_t> name_ends, offsets, sizes;
  std::vector<uint8_t> formats, orientations;
  std::vector<int32_t> widths, heights;
  int64_t at = 0, number = 0;
};

// ---- bytes of a file ---------------------------------------------------------------------------------------------------

class File {
 public:
  // nonblocking: opening a pipe would wait for somebody who writes
  explicit File(const std::string& path) : descriptor_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    struct stat state;
    if (descriptor_ >= 0 && fstat(descriptor_, &state) == 0 && S_ISREG(state.st_mode)) size_ = state.st_size;
  }
  ~File() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int64_t size() const { return size_; }  // -1: no file that can be read

  // `count` bytes at `at` in memory, at most WINDOW; nullptr where the file has not as many.
  const uint8_t* look(int64_t at, int64_t count) {
    if (at < 0 || count > WINDOW || at > size_ - count) return nullptr;
    if (at < begin_ || at + count > begin_ + there_) {
      begin_ = at;
      there_ = read(at, window_, std::min(WINDOW, size_ - at));
      if (there_ < count) return nullptr;
    }
    return window_ + (at - begin_);
  }

  int64_t read(int64_t at, uint8_t* to, int64_t count) const {
    int64_t done = 0;
    while (done < count) {
      const ssize_t got = pread(descriptor_, to + done, size_t(count - done), at + done);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) break;
      done += got;
    }
    return done;
  }

 private:
  int descriptor_;
  int64_t size_ = -1, begin_ = 0, there_ = 0;
  uint8_t window_[WINDOW];
};

uint32_t big(const uint8_t* from, int bytes) {
  uint32_t value = 0;
  for (int i = 0; i < bytes; i++) value = value << 8 | from[i];
  return value;
}

uint32_t little(const uint8_t* from, int bytes) {
  uint32_t value = 0;
  for (int i = bytes; i-- > 0;) value = value << 8 | from[i];
  return value;
}

// ---- images ------------------------------------------------------------------------------------------------------------

// The part of a file that one member is.
struct Part {
  File& file;
  int64_t offset, size;
  const uint8_t* look(int64_t at, int64_t count) const {
    return at < 0 || at > size - count ? nullptr : file.look(offset + at, count);
  }
};

// EXIF's orientation in a segment's TIFF part of `size` bytes at `at`; 1 where it has none.
uint8_t orientation_of(const Part& part, int64_t at, int64_t size) {
  const uint8_t* head = size < 8 ? nullptr : part.look(at, 8);
  if (!head) return 1;
  const bool is_little = std::memcmp(head, "II*\0", 4) == 0;
  if (!is_little && std::memcmp(head, "MM\0*", 4) != 0) return 1;
  const auto number = is_little ? little : big;
  const int64_t directory = number(head + 4, 4);
  if (directory > size - 2) return 1;
  const uint8_t* found = part.look(at + directory, 2);
  const int entries = found ? int(number(found, 2)) : 0;
  for (int i = 0; i < entries; i++) {
    const int64_t entry = directory + 2 + 12 * int64_t(i);
    if (entry > size - 12 || !(found = part.look(at + entry, 12))) return 1;
    if (number(found, 2) != 0x0112) continue;
    const uint32_t value = number(found + 8, 2);
    return number(found + 2, 2) == 3 && value >= 1 && value <= 8 ? uint8_t(value) : 1;
  }
  return 1;
}

Image jpeg(const Part& part) {
  Image image;
  image.format = JPEG;
  int64_t at = 2;
  for (int i = 0; i < SEGMENTS; i++) {
    const uint8_t* head = part.look(at, 4);
    if (!head || head[0] != 0xff) return image;
    const int marker = head[1];
    if (marker == 0xff) {  // a fill byte
      at += 1;
      continue;
    }
    if (marker == 0x01 || (marker >= 0xd0 && marker <= 0xd8)) {
      at += 2;
      continue;
    }
    if (marker == 0xd9 || marker == 0xda) return image;
    const int64_t length = big(head + 2, 2);
    if (length < 2) return image;
    if (marker >= 0xc0 && marker <= 0xcf && marker != 0xc4 && marker != 0xc8 && marker != 0xcc) {
      const uint8_t* frame = part.look(at + 4, 5);
      if (!frame) return image;
      image.height = int32_t(big(frame + 1, 2));
      image.width = int32_t(big(frame + 3, 2));
      return image;
    }
    if (marker == 0xe1 && length >= 8) {
      const uint8_t* name = part.look(at + 4, 6);
      if (name && std::memcmp(name, "Exif\0\0", 6) == 0) image.orientation = orientation_of(part, at + 10, length - 8);
    }
    at += 2 + length;
  }
  return image;
}

Image webp(const Part& part) {
  Image image;
  image.format = WEBP;
  const uint8_t* head = part.look(12, 18);
  if (!head) return image;
  if (std::memcmp(head, "VP8 ", 4) == 0 && std::memcmp(head + 11, "\x9d\x01\x2a", 3) == 0) {
    image.width = int32_t(little(head + 14, 2) & 0x3fff);
    image.height = int32_t(little(head + 16, 2) & 0x3fff);
  } else if (std::memcmp(head, "VP8L", 4) == 0 && head[8] == 0x2f) {
    const uint32_t bits = little(head + 9, 4);
    image.width = int32_t((bits & 0x3fff) + 1);
    image.height = int32_t((bits >> 14 & 0x3fff) + 1);
  } else if (std::memcmp(head, "VP8X", 4) == 0) {
    image.width = int32_t(little(head + 12, 3) + 1);
    image.height = int32_t(little(head + 15, 3) + 1);
  }
  return image;
}

// Sizes that are no image's are left 0.
Image sized(uint8_t format, int64_t width, int64_t height) {
  Image image;
  image.format = format;
  if (width > 0 && height > 0 && width <= INT32_MAX && height <= INT32_MAX) {
    image.width = int32_t(width);
    image.height = int32_t(height);
  }
  return image;
}

Image image_of(const Part& part) {
  const uint8_t* head = part.look(0, 12);
  if (!head) return {};
  if (std::memcmp(head, "\xff\xd8\xff", 3) == 0) return jpeg(part);
  if (std::memcmp(head, "\x89PNG\r\n\x1a\n", 8) == 0) {
    const uint8_t* first = part.look(8, 16);
    if (!first || std::memcmp(first + 4, "IHDR", 4) != 0) return sized(PNG, 0, 0);
    return sized(PNG, big(first + 8, 4), big(first + 12, 4));
  }
  if (std::memcmp(head, "RIFF", 4) == 0 && std::memcmp(head + 8, "WEBP", 4) == 0) return webp(part);
  if (std::memcmp(head, "GIF87a", 6) == 0 || std::memcmp(head, "GIF89a", 6) == 0)
    return sized(GIF, little(head + 6, 2), little(head + 8, 2));
  if (head[0] == 'B' && head[1] == 'M') {
    const uint8_t* first = part.look(14, 12);
    if (!first) return {};
    const uint32_t size = little(first, 4);
    if (size == 12) return sized(BMP, little(first + 4, 2), little(first + 6, 2));
    if (size >= 40 && size <= 124)
      return sized(BMP, int32_t(little(first + 4, 4)), std::abs(int64_t{int32_t(little(first + 8, 4))}));
  }
  return {};
}

// ---- tar ---------------------------------------------------------------------------------------------------------------

constexpr int64_t NO_NUMBER = -1;

// An octal field, or GNU's base 256; NO_NUMBER for anything else, and for what 63 bits do not hold.
int64_t number_of(const uint8_t* field, int size) {
  if (field[0] == 0x80) {
    int64_t value = 0;
    for (int i = 1; i < size; i++) {
      if (value > INT64_MAX >> 8) return NO_NUMBER;
      value = value << 8 | field[i];
    }
    return value;
  }
  int i = 0;
  int64_t value = 0;
  while (i < size && field[i] == ' ') i++;
  for (; i < size && field[i] >= '0' && field[i] <= '7'; i++) value = value << 3 | (field[i] - '0');
  for (; i < size && field[i] == ' '; i++) {
  }
  return i == size || field[i] == 0 ? value : NO_NUMBER;
}

bool checksum_holds(const uint8_t* header) {
  int64_t sum = 8 * ' ', signed_sum = 8 * ' ';  // of old tars
  for (int i = 0; i < BLOCK; i++)
    if (i < 148 || i >= 156) sum += header[i], signed_sum += int8_t(header[i]);
  const int64_t noted = number_of(header + 148, 8);
  return noted != NO_NUMBER && (noted == sum || noted == signed_sum);
}

std::string text_of(const uint8_t* field, size_t size) {
  return std::string(reinterpret_cast<const char*>(field), strnlen(reinterpret_cast<const char*>(field), size));
}

std::string name_of(const uint8_t* header) {
  const std::string name = text_of(header, 100);
  const std::string folder = std::memcmp(header + 257, "ustar", 6) == 0 ? text_of(header + 345, 155) : "";
  return folder.empty() ? name : folder + "/" + name;
}

struct Attributes {
  bool named = false, sized = false, sparse = false;
  std::string name;
  int64_t size = 0;
};

// pax records, LENGTH KEY=VALUE and a newline; what is no record ends them.
void read_pax(const std::string& records, Attributes& found) {
  size_t at = 0;
  while (at < records.size()) {
    size_t digits = at, length = 0;
    while (digits < records.size() && records[digits] >= '0' && records[digits] <= '9' && digits - at < 8)
      length = length * 10 + size_t(records[digits++] - '0');
    if (digits == at || digits >= records.size() || records[digits] != ' ') return;
    if (length <= digits + 1 - at || length > records.size() - at) return;
    const std::string record = records.substr(digits + 1, at + length - digits - 2);
    const size_t equals = record.find('=');
    const std::string key = record.substr(0, equals), value = equals == record.npos ? "" : record.substr(equals + 1);
    if (key == "path") found.named = true, found.name = value.substr(0, value.find_last_not_of('/') + 1);
    if (key.compare(0, 11, "GNU.sparse.") == 0) found.sparse = true;
    if (key == "size") {
      found.sized = true;
      found.size = value.empty() || value.size() > 18 ? NO_NUMBER : 0;
      for (const char c : value)
        found.size = found.size == NO_NUMBER || c < '0' || c > '9' ? NO_NUMBER : found.size * 10 + (c - '0');
    }
    at += length;
  }
}

void fail(Found& found, const char* error, int64_t at, int64_t number = 0) {
  found.error = error;
  found.at = at;
  found.number = number;
}

void add(Found& found, const std::string& name, int64_t offset, int64_t size, const Image& image) {
  found.names += name;
  found.name_ends.push_back(int64_t(found.names.size()));
  found.offsets.push_back(offset);
  found.sizes.push_back(size);
  found.formats.push_back(image.format);
  found.orientations.push_back(image.orientation);
  found.widths.push_back(image.width);
  found.heights.push_back(image.height);
}

void scan_one(const std::string& path, bool images, Found& found) {
  File file(path);
  const int64_t size = file.size();
  if (size < 0) return fail(found, "unreadable", 0);
  if (size < BLOCK) return fail(found, "damaged", 0);
  Attributes next;
  for (int64_t at = 0; at + BLOCK <= size;) {
    const uint8_t* header = file.look(at, BLOCK);
    if (!header) return fail(found, "unreadable", at);
    if (std::all_of(header, header + BLOCK, [](uint8_t byte) { return byte == 0; })) return;  // the mark of the end
    int64_t length = number_of(header + 124, 12);
    if (length == NO_NUMBER || !checksum_holds(header)) return fail(found, "damaged", at);
    uint8_t kind = header[156];
    const std::string field = text_of(header, 100);
    if (kind == 0 && !next.named && !field.empty() && field.back() == '/') kind = '5';  // a folder of old tars
    const bool regular = kind == '0' || kind == 0 || kind == '7';
    const bool record = kind == 'L' || kind == 'K' || kind == 'x' || kind == 'X' || kind == 'g';  // of members behind it
    const std::string own = regular ? name_of(header) : "";
    if (!record && next.sized) length = next.size;
    if (kind >= '1' && kind <= '6') length = 0;  // links, devices, folders: a size is not of bytes behind the header
    const int64_t start = at + BLOCK;
    if (length < 0) return fail(found, "damaged", at);
    if (length > size - start) return fail(found, "cut", at, length);
    if (record && kind != 'K') {
      if (length > RECORD) return fail(found, "long", at, length);
      std::string text(size_t(length), 0);
      if (file.read(start, reinterpret_cast<uint8_t*>(text.data()), length) < length)
        return fail(found, "unreadable", start);
      if (kind == 'L') {
        next.named = true;
        next.name = text.substr(0, text.find('\0'));
      } else {
        Attributes of_all;
        read_pax(text, kind == 'g' ? of_all : next);
        if (of_all.named || of_all.sized || of_all.sparse) return fail(found, "global", at);
      }
    } else if (!record) {
      if (kind == 'S' || next.sparse) return fail(found, "sparse", at);
      if (regular) add(found, next.named ? next.name : own, start, length, images ? image_of({file, start, length}) : Image{});
      next = {};
    }
    at = start + length / BLOCK * BLOCK + (length % BLOCK ? BLOCK : 0);
  }
}

template <class T>
py::bytes bytes_of(const std::vector<T>& values) {
  return py::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

py::list scan(const std::vector<std::string>& paths, int threads, bool images) {
  std::vector<Found> found(paths.size());
  {
    py::gil_scoped_release others_may_run;
    std::atomic<size_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr failure;  // the first: what leaves a thread would end the process
    const auto work = [&]() noexcept {
      try {
        for (size_t i; !failed && (i = next++) < paths.size();) scan_one(paths[i], images, found[i]);
      } catch (...) {
        if (!failed.exchange(true)) failure = std::current_exception();
      }
    };
    std::vector<std::thread> pool;
    const size_t others = size_t(std::max<int64_t>(std::min<int64_t>(threads, int64_t(paths.size())) - 1, 0));
    pool.reserve(others);  // so that nothing but a thread can fail below
    try {
      while (pool.size() < others) pool.emplace_back(work);
    } catch (const std::system_error&) {
      // as many as the machine has to give: those that run, and this one, take all shards
    } catch (const std::bad_alloc&) {
    }
    work();
    for (auto& thread : pool) thread.join();
    if (failure) std::rethrow_exception(failure);  // bad_alloc is Python's MemoryError
  }
  py::list shards;
  for (const Found& f : found) {
    if (f.error.empty())
      shards.append(py::make_tuple(py::bytes(f.names), bytes_of(f.name_ends), bytes_of(f.offsets), bytes_of(f.sizes),
                                   bytes_of(f.formats), bytes_of(f.orientations), bytes_of(f.widths),
                                   bytes_of(f.heights)));
    else
      shards.append(py::make_tuple(f.error, f.at, f.number));
  }
  return shards;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "The header pass over tar shards; mvle/data/headers.py says what it gives, and has a twin in Python.";
  m.attr("FORM") = FORM;
  m.def("scan", &scan, py::arg("paths"), py::arg("threads"), py::arg("images"));
}
