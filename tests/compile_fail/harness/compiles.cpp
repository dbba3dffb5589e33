// expect: this sentence is never said
int main() {}
