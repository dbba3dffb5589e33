// What makes a line of the byte pictures, and of which kind it is.
#include "support/bytes_picture.hpp"

#include <gtest/gtest.h>

#include <kvpare/core/error.hpp>

namespace {

using namespace example;

TEST(BytesPictureTest, ALineLeavesOutWhatVaries) {
  EXPECT_EQ(line_of("kivi(bits=4, residual=32)"), "kivi(bits=…, residual=32)");
  EXPECT_EQ(line_of("in_form(residual=8, form=int4)"), "in_form(residual=8, form=…)");
  EXPECT_EQ(line_of("mikv(keep=0.2, low=int2)"), "mikv(keep=0.2, low=…)");
  EXPECT_EQ(line_of("qaq(capacity=2)"), "qaq(capacity=…)");
  EXPECT_EQ(line_of("csr(nonzeros=4, dictionary=online256)"), "csr(nonzeros=…, dictionary=online256)");
  EXPECT_EQ(line_of("vid_kv(percent=75, residual=32)"), "vid_kv(percent=…, residual=32)");
  EXPECT_EQ(line_of("joint(keep=64KiB, forms=int8+int4)"), "joint(keep=…, forms=int8+int4)");
  EXPECT_EQ(line_of("h2o(keep = 0.5) + kivi(bits=2)"), "h2o(keep=…) + kivi(bits=2)") << "of two methods only the budget";
  EXPECT_EQ(line_of("full"), "full");
}

TEST(BytesPictureTest, KindsFollowFromThePolicy) {
  EXPECT_EQ(saves_by("full"), Saves::nothing);
  EXPECT_EQ(saves_by("snap_kv(keep=0.1)"), Saves::eviction);
  EXPECT_EQ(saves_by("kivi(bits=2)"), Saves::bits);
  EXPECT_EQ(saves_by("mikv(keep=0.2, low=int2)"), Saves::bits) << "its rest stays";
  EXPECT_EQ(saves_by("h2o(keep=0.2) + kivi(bits=2)"), Saves::both);
  EXPECT_EQ(saves_by("joint(keep=1MiB)"), Saves::joint);
  EXPECT_THROW(saves_by("no_such"), kvpare::InvalidArgument);
}

}  // namespace
