# cmake -DSOURCE=python/tconv -DTARGET=<build>/python/tconv -P link_sources.cmake: symbolic links to every Python source.
file(MAKE_DIRECTORY ${TARGET})
file(GLOB sources ${SOURCE}/*.py ${SOURCE}/*.pyi ${SOURCE}/py.typed ${SOURCE}/nn)
foreach(source IN LISTS sources)
  get_filename_component(name ${source} NAME)
  file(CREATE_LINK ${source} ${TARGET}/${name} SYMBOLIC COPY_ON_ERROR)
endforeach()
