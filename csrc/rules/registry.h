// Every rule, once. Adding one is its header here and a line in this list; setup.py reads it, and makes a translation
// unit of each rule for each backend.
#pragma once

//         header, struct
#define FUSEDREG_RULES(RULE) \
  RULE(adam, Adam)           \
  RULE(sgd, Sgd)             \
  RULE(rmsprop, RMSprop)     \
  RULE(adagrad, Adagrad)     \
  RULE(nadam, NAdam)         \
  RULE(radam, RAdam)         \
  RULE(adamax, Adamax)       \
  RULE(adadelta, Adadelta)   \
  RULE(lion, Lion)           \
  RULE(asgd, Asgd)           \
  RULE(rprop, Rprop)         \
  RULE(ftrl, Ftrl)
