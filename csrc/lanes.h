// The vector type of one level; read by dispatch.h inside each level's namespace, hence no guard.

template <class T>
struct LanesOf {
  typedef T Type __attribute__((vector_size(SSSD_BYTES)));
};

template <class T>
using Lanes = typename LanesOf<T>::Type;

template <class T>
constexpr int64_t LANES = SSSD_BYTES / static_cast<int64_t>(sizeof(T));

template <class T>
SSSD_INLINE Lanes<T> load(const T* from) {
  Lanes<T> value;
  __builtin_memcpy(&value, from, SSSD_BYTES);
  return value;
}

template <class T>
SSSD_INLINE void store(T* to, Lanes<T> value) {
  __builtin_memcpy(to, &value, SSSD_BYTES);
}

template <class T>
SSSD_INLINE Lanes<T> fill(T value) {
  return value - Lanes<T>{};
}
