"""Operations with one public function each, an XLA reference, and back ends behind `impl=`."""
