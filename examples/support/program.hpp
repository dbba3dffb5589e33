// The main function of a program: from the command line to an exit status, errors as a sentence.
#pragma once

#include <CLI/CLI.hpp>
#include <exception>
#include <iostream>

namespace example {

/// Lets `declare(app, arguments)` say what there is to say, parses the command line, and returns what `run(arguments)`
/// does; a wrong command line and anything thrown is told on the error stream.
template <class Arguments>
int run_program(const char* name, const char* what_it_does, int count, char** words,
                void (*declare)(CLI::App&, Arguments&), int (*run)(Arguments&)) {
  CLI::App app(what_it_does);
  Arguments arguments;
  declare(app, arguments);
  try {
    app.parse(count, words);
    return run(arguments);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  } catch (const std::exception& error) {
    std::cerr << name << ": " << error.what() << '\n';
    return 1;
  }
}

}  // namespace example
