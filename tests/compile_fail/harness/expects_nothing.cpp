static_assert(false);
int main() {}
