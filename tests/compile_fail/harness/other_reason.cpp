// expect: keys and values differ
static_assert(sizeof(char) == 2, "another sentence");
int main() {}
