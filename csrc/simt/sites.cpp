#include "simt/sites.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <stdexcept>

#include "simt/report.h"
#include "simt/simt.h"

namespace partita::simt {
namespace {

std::mutex g_mutex;
std::set<std::string> g_visited;
std::string g_disabled_file;
int g_disabled_line = -1;

// What lies under csrc, however the compiler was given the path.
const char* path_in_tree(const char* file) {
  const char* path = file;
  for (const char* at = std::strstr(file, "csrc/"); at; at = std::strstr(at + 1, "csrc/")) path = at + 5;
  return path;
}

}  // namespace

const char* describe(Site site, char (&buffer)[256]) {
  std::snprintf(buffer, sizeof buffer, "%s:%d", site.file ? path_in_tree(site.file) : "?", site.line);
  return buffer;
}

void SiteSwitch::refresh() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  disabled_file_ = g_disabled_file;
  disabled_line_ = g_disabled_line;
  for (Site& site : seen_) site = {};
  visited_.clear();
}

void SiteSwitch::publish() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  char buffer[256];
  for (Site site : visited_) g_visited.insert(describe(site, buffer));
  visited_.clear();
}

void SiteSwitch::note(uint32_t slot, Site site) {
  seen_[slot] = site;
  for (const Site& other : visited_)
    if (other.file == site.file && other.line == site.line) return;
  visited_.push_back(site);
}

bool SiteSwitch::is_disabled(Site site) const {
  const size_t length = std::strlen(site.file), wanted = disabled_file_.size();
  if (wanted > length || std::memcmp(site.file + length - wanted, disabled_file_.data(), wanted) != 0) return false;
  return wanted == length || site.file[length - wanted - 1] == '/';
}

void set_disabled_site(const std::string& site) {
  const size_t colon = site.rfind(':');
  std::string file;
  int line = -1;
  if (!site.empty()) {
    char* end = nullptr;
    const long number = colon == std::string::npos ? 0 : std::strtol(site.c_str() + colon + 1, &end, 10);
    if (number <= 0 || colon == 0 || *end != '\0')
      throw std::invalid_argument("site: got \"" + site + "\", wanted \"file:line\" or \"\"");
    file = site.substr(0, colon);
    line = static_cast<int>(number);
  }
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_disabled_file = file;
  g_disabled_line = line;
}

std::vector<std::string> visited_sites() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return {g_visited.begin(), g_visited.end()};
}

void reset_visited_sites() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_visited.clear();
}

}  // namespace partita::simt
