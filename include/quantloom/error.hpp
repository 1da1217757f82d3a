// Errors. Every function of the library reports a failure by throwing one of these, before any work
// has changed its outputs. A message names the argument, what was given and what was expected.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace quantloom {

// Base of all errors thrown by the library.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// An argument has the wrong shape, range or combination. Python: ValueError.
class InvalidArgument : public Error {
 public:
  using Error::Error;
  // "<argument>: got <got>, expected <expected>"
  InvalidArgument(std::string_view argument, std::string_view got, std::string_view expected)
      : Error(std::string(argument) + ": got " + std::string(got) + ", expected " + std::string(expected)) {}
};

// An argument has the wrong type or dtype. Python: TypeError.
class TypeMismatch : public Error {
 public:
  TypeMismatch(std::string_view argument, std::string_view got, std::string_view expected)
      : Error(std::string(argument) + ": got " + std::string(got) + ", expected " + std::string(expected)) {}
};

// Numbers that the computation cannot take: NaN or Inf, a scale outside its type's range, a Hessian
// that is not positive definite after all damping. Python: ValueError.
class NumericError : public Error {
 public:
  using Error::Error;
};

// A file's contents break the rules of its format. Python: ValueError.
class FileFormatError : public Error {
 public:
  using Error::Error;
};

// The operating system refused: names the path and the reason. Python: OSError.
class IoError : public Error {
 public:
  using Error::Error;
};

// A combination that no kernel or layout of this build can serve. Python: RuntimeError.
class Unsupported : public Error {
 public:
  using Error::Error;
};

// Builds a message or one of its parts: text_of("shape [", n, ", ", k, "]").
template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace quantloom
