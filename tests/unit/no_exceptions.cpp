// Errors where exceptions are off: the handler gets the message, and nothing returns from an error.
#include <gtest/gtest.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>

// As -fno-exceptions does; the rest of this program needs them.
#undef __cpp_exceptions
#include <kvpare/core/shape.hpp>

namespace kvpare {
namespace {

void check_a_wrong_shape() { check(Model{{{.q_heads = 3, .kv_heads = 2, .key_dim = 1, .value_dim = 1, .scale = 1}}}); }

TEST(WithoutExceptionsDeathTest, TheHandlerGetsTheMessage) {
  error_handler() = [](const char* message) {
    std::fputs(message, stderr);
    std::exit(3);
  };
  EXPECT_EXIT(check_a_wrong_shape(), ::testing::ExitedWithCode(3), "^layer 0: q_heads = 3, must be a positive multiple of kv_heads = 2$");
}

TEST(WithoutExceptionsDeathTest, AHandlerThatReturnsIsFollowedByAbort) {
  error_handler() = [](const char*) {};
  EXPECT_EXIT(check_a_wrong_shape(), ::testing::KilledBySignal(SIGABRT), "");
}

TEST(WithoutExceptionsDeathTest, WithoutAHandlerTheProgramAborts) {
  error_handler() = nullptr;
  EXPECT_EXIT(check_a_wrong_shape(), ::testing::KilledBySignal(SIGABRT), "");
}

}  // namespace
}  // namespace kvpare
